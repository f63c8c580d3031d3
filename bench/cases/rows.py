"""Cases of the row ops: pool_chunks, select_chunk_rows, project_chunks, embed_mixed and linear_rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import refrag_kernels as rk
from bench.cases.peers import late, vllm_overlay
from bench.cases.presets import PRESETS, Preset
from bench.engine.case import Case, Entry, Skip, Sweep, bound_of

_WEIGHT_SCALE = 0.05  # keeps the projection's outputs near 1


def _random(*shape: int, dtype: torch.dtype, device: str, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


def _weights(shape: Preset, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    sizes = [
        (shape.hidden_size, shape.encoder_hidden_size),
        (shape.hidden_size,),
        (shape.hidden_size, shape.hidden_size),
        (shape.hidden_size,),
    ]
    return [_random(*size, dtype=dtype, device=device, seed=i, scale=_WEIGHT_SCALE) for i, size in enumerate(sizes)]


def _count(context: int, k: int) -> int:
    if context < k:
        raise Skip(f"a context of {context} has no chunk of {k}")
    return context // k


def _eager(chunks: torch.Tensor, w1, b1, w2, b2) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(chunks, w1, b1)), w2, b2)


def _flops(shape: Preset, count: int) -> float:
    return 2.0 * count * shape.hidden_size * (shape.encoder_hidden_size + shape.hidden_size)


def _project(preset: str, context: int, k: int, dtype: torch.dtype, device: str) -> Case:
    shape, count = PRESETS[preset], _count(context, k)
    weights = _weights(shape, dtype, device)
    chunks = _random(count, shape.encoder_hidden_size, dtype=dtype, device=device, seed=9)
    packed = rk.PackedProjection.from_weights(*weights)
    return Case(
        ours=lambda: rk.project_chunks(chunks, packed),
        peers={"Linear, GELU, Linear": lambda: _eager(chunks, *weights)},
        expected=lambda: _eager(chunks.double(), *(w.double() for w in weights)),
        bound=bound_of(dtype),
        flops=_flops(shape, count),
        limit="matmul",
    )


def _embed(preset: str, context: int, k: int, dtype: torch.dtype, device: str) -> Case:
    """Chunks projected into a mixed sequence with text rows: half as many as chunks, plus 64."""
    shape, count = PRESETS[preset], _count(context, k)
    text = count // 2 + 64
    weights = _weights(shape, dtype, device)
    packed = rk.PackedProjection.from_weights(*weights)
    chunks = _random(count, shape.encoder_hidden_size, dtype=dtype, device=device, seed=9)
    table = _random(32000, shape.hidden_size, dtype=dtype, device=device, seed=10)
    generator = torch.Generator().manual_seed(11)
    order = torch.randperm(count + text, generator=generator)
    slots, texts = order[:count].sort().values, order[count:].sort().values
    ids = torch.zeros(count + text, dtype=torch.int64)
    ids[texts] = torch.randint(0, len(table), (text,), generator=generator)
    slot_of_row = torch.full((count + text,), -1, dtype=torch.int32)
    slot_of_row[slots] = torch.arange(count, dtype=torch.int32)
    is_slot = (slot_of_row >= 0).to(device)
    text_ids, ids, slot_of_row, slots, texts = (t.to(device) for t in (ids[texts], ids, slot_of_row, slots, texts))

    def scattered(chunks: torch.Tensor, table: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty(count + text, table.shape[1], dtype=table.dtype, device=table.device)
        out.index_copy_(0, slots, _eager(chunks, *weights))
        return out.index_copy_(0, texts, table[text_ids])

    def masked() -> torch.Tensor:
        out = table[ids]
        out[is_slot] = _eager(chunks, *weights)
        return out

    def overlaid() -> Callable[[], torch.Tensor]:
        out, embeds = torch.empty(len(ids), table.shape[1], dtype=dtype, device=device), torch.empty_like(table[ids])
        overlay = vllm_overlay(out, embeds, (~is_slot).to(torch.uint8))

        def call() -> torch.Tensor:
            torch.index_select(table, 0, ids, out=out)
            embeds.index_copy_(0, slots, _eager(chunks, *weights))
            overlay()
            return out

        return call

    return Case(
        ours=lambda: rk.embed_mixed(ids, table, chunks, slot_of_row, packed),
        peers={
            "Linear, GELU, Linear, gather, scatter": lambda: scattered(chunks, table, *weights),
            "Linear, GELU, Linear, bool index": masked,
            "Linear, GELU, Linear, vLLM's overlay": late(overlaid),
        },
        expected=lambda: scattered(chunks.double(), table.double(), *(w.double() for w in weights)),
        bound=bound_of(dtype),
        flops=_flops(shape, count),
        limit="matmul",
    )


def _pool(preset: str, context: int, k: int, dtype: torch.dtype, device: str) -> Case:
    shape, count = PRESETS[preset], _count(context, k)
    hidden_size = shape.encoder_hidden_size
    hidden = _random(count * k, hidden_size, dtype=dtype, device=device, seed=0)
    offsets = (torch.arange(count + 1, dtype=torch.int32) * k).to(device)
    chunk_of_row = torch.arange(count).repeat_interleave(k).to(device)

    def scattered() -> torch.Tensor:
        sums = torch.zeros(count, hidden_size, dtype=torch.float32, device=device)
        return (sums.index_add_(0, chunk_of_row, hidden.float()) / k).to(dtype)

    return Case(
        ours=lambda: rk.pool_chunks(hidden, offsets, "mean"),
        peers={
            "mean of a padded batch": lambda: hidden.view(count, k, hidden_size).mean(1),
            "index_add": scattered,
        },
        expected=lambda: hidden.double().view(count, k, hidden_size).mean(1),
        bound=bound_of(dtype),
        bytes=float((count * k + count) * hidden_size * dtype.itemsize),
        limit="read",
    )


def _select(scored: bool, preset: str, context: int, k: int, dtype: torch.dtype, device: str) -> Case:
    """The best row of each chunk's keys and values by scores, or by how unlike its chunk's mean a key is."""
    shape, count = PRESETS[preset], _count(context, k)
    heads, head_dim = shape.kv_heads, shape.head_dim
    # [H, T, D] in memory, as in a cache of transformers.
    key, v = (
        _random(heads, count * k, head_dim, dtype=dtype, device=device, seed=seed).transpose(0, 1) for seed in (0, 1)
    )
    scores = _random(count * k, heads, dtype=torch.float32, device=device, seed=2) if scored else None
    offsets = torch.arange(count + 1, dtype=torch.int32) * k
    kept = rk.kept_offsets(offsets, 1).to(device)
    offsets = offsets.to(device)
    first = (torch.arange(count) * k).to(device)[:, None]

    def gathered(wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        of_row = scores
        if of_row is None:
            keys = key.to(wide).unflatten(0, (count, k))
            of_row = -F.cosine_similarity(keys, keys.mean(1, keepdim=True), dim=-1).flatten(0, 1)
        rows = of_row.view(count, k, heads).argmax(1) + first
        index = rows[..., None].expand(-1, -1, head_dim)
        return key.gather(0, index), v.gather(0, index), rows.int()

    elements = count * heads * head_dim * (4 if scored else k + 3)  # all keys, or the chosen ones; v; both written
    return Case(
        ours=lambda: rk.select_chunk_rows(key, v, offsets, kept, count, scores),
        peers={"argmax, gather" if scored else "cosine_similarity, argmax, gather": lambda: gathered(torch.float32)},
        expected=lambda: gathered(torch.float64),
        bound=bound_of(dtype),
        bytes=float(elements * dtype.itemsize + (4 * count * k * heads if scored else 0)),
        limit="read",
    )


def _linear(preset: str, dtype: torch.dtype, device: str) -> Case:
    """One row through a decoder's largest layer, from hidden_size to the vocabulary."""
    shape = PRESETS[preset]
    x = _random(1, shape.hidden_size, dtype=dtype, device=device, seed=0)
    weight = _random(shape.vocabulary, shape.hidden_size, dtype=dtype, device=device, seed=1, scale=_WEIGHT_SCALE)
    return Case(
        ours=lambda: rk.linear_rows(x, weight),
        peers={"torch Linear": lambda: F.linear(x, weight)},
        expected=lambda: F.linear(x.double(), weight.double()),
        bound=bound_of(dtype),
        bytes=float(weight.nbytes),
        limit="read",
    )


def entries(sweep: Sweep) -> Iterator[Entry]:
    """Yield the rows of pooling, selection, projection, assembly and the linear layer."""
    makers: list[tuple[str, str, Callable[..., Case]]] = [
        ("pool_chunks", "mean", _pool),
        ("select_chunk_rows", "scores", functools.partial(_select, True)),
        ("select_chunk_rows", "unlike", functools.partial(_select, False)),
        ("project_chunks", "chunks", _project),
        ("embed_mixed", "mixed", _embed),
    ]
    common = itertools.product(sweep.presets, sweep.context, sweep.k, sweep.dtypes)
    for preset, context, k, dtype in common:
        for op, case, make in makers:
            build = functools.partial(make, preset, context, k, dtype, sweep.device)
            yield Entry(op, case, preset, dtype, {"context": context, "k": k}, build)
    for preset, dtype in itertools.product(sweep.presets, sweep.dtypes):
        yield Entry("linear_rows", "head", preset, dtype, {}, functools.partial(_linear, preset, dtype, sweep.device))
