"""Cases of paged_attention, append_kv and merge_states: decoding."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import refrag_kernels as rk
from bench.case import Case, Entry, Sweep, bound_of
from bench.presets import PRESETS
from refrag_kernels import backends

_PAGE = 16
_ROWS = 64  # of a chunk of prefill, as append_kv writes them
_COLD = 1 << 29  # bytes of keys and values in all: more than the caches hold


def _cache(heads: int, width: int, pages: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(pages, _PAGE, heads, width, generator=generator).to(device, dtype) for _ in range(2))
    return k, v


def _decode(preset: str, context: int, dtype: torch.dtype, device: str) -> Case:
    """One row and ``context`` keys; several sequences are read in turns, so that keys come from memory, not a cache."""
    shape = PRESETS[preset]
    blocks = -(-context // _PAGE)
    size = 2 * context * shape.kv_heads * shape.width * dtype.itemsize
    sequences = max(2, -(-_COLD // size))
    k_pages, v_pages = _cache(shape.kv_heads, shape.width, sequences * blocks, dtype, device)
    order = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(1))
    tables = order.to(device, torch.int32).view(sequences, 1, blocks)
    lengths = torch.tensor([context], dtype=torch.int32, device=device)
    q = torch.randn(1, shape.heads, shape.width, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    # SDPA has no pages: it is given each sequence's keys in one piece, [1, H_kv, T, D].
    k_whole, v_whole = (
        t[tables[:, 0].long()].flatten(1, 2)[:, None, :context].transpose(2, 3) for t in (k_pages, v_pages)
    )
    turns: dict[str | None, int] = {}

    def turn(name: str | None) -> int:
        turns[name] = (turns.get(name, -1) + 1) % sequences
        return turns[name]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def ours() -> torch.Tensor:
        return rk.paged_attention(q, k_pages, v_pages, tables[turn(backends.pinned(None))], lengths)

    def contiguous() -> torch.Tensor:
        at = turn("SDPA")
        return attend(q, k_whole[at], v_whole[at])

    def gathered() -> torch.Tensor:
        table = tables[turn("gather")].long()
        return attend(q, *(t[table].flatten(1, 2)[:, :context].transpose(1, 2) for t in (k_pages, v_pages)))

    def expected() -> torch.Tensor:
        # Every contender's first call, which is the one that is checked, reads the first sequence.
        return attend(q.double(), k_whole[0].double(), v_whole[0].double())

    return Case(
        ours=ours,
        peers={"SDPA, contiguous keys": contiguous, "gather pages, SDPA": gathered},
        expected=expected,
        bound=bound_of(dtype),
        flops=4.0 * shape.heads * shape.width * context,
        bytes=float(size),
        limit="read",
        most_copies=1,  # it takes turns among its sequences
    )


def _append(preset: str, dtype: torch.dtype, device: str) -> Case:
    shape = PRESETS[preset]
    blocks = _ROWS // _PAGE
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(_ROWS, shape.kv_heads, shape.width, generator=generator).to(device, dtype) for _ in range(2))
    table = torch.randperm(4 * blocks, generator=generator)[:blocks].to(device, torch.int32)[None]
    lengths = torch.tensor([_ROWS], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, _ROWS], dtype=torch.int32, device=device)
    ours, theirs, exact = (_cache(shape.kv_heads, shape.width, 4 * blocks, dtype, device) for _ in range(3))
    row = torch.arange(_ROWS, device=device)
    page, place = table[0, row // _PAGE].long(), row % _PAGE

    def append() -> tuple[torch.Tensor, torch.Tensor]:
        rk.append_kv(k, v, *ours, table, lengths, offsets)
        return ours

    def indexed(cache: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        cache[0][page, place] = k
        cache[1][page, place] = v
        return cache

    return Case(
        ours=append,
        peers={"index_put": lambda: indexed(theirs)},
        expected=lambda: indexed(exact),
        bytes=4.0 * k.nbytes,  # read and written, keys and values
        limit="read",
    )


def _merge(preset: str, context: int, k: int, dtype: torch.dtype, device: str) -> Case:
    shape, rows = PRESETS[preset], max(1, context // k)
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(rows, shape.heads, shape.width, generator=generator).to(device, dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(rows, shape.heads, generator=generator).to(device) for _ in range(2))

    def eager(a, lse_a, b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
        lse = torch.logaddexp(lse_a, lse_b)
        out = (lse_a - lse).exp()[..., None] * a + (lse_b - lse).exp()[..., None] * b
        return out.to(a.dtype), lse

    return Case(
        ours=lambda: rk.merge_states(a, lse_a, b, lse_b),
        peers={"logaddexp, exp, multiply, add": lambda: eager(a, lse_a, b, lse_b)},
        expected=lambda: eager(*(t.double() for t in (a, lse_a, b, lse_b))),
        bound=bound_of(dtype),
        bytes=3.0 * (a.nbytes + lse_a.nbytes),
        limit="read",
    )


def entries(sweep: Sweep) -> Iterator[Entry]:
    """Yield the rows of the paged family."""
    for preset, dtype in itertools.product(sweep.presets, sweep.dtypes):
        to = (dtype, sweep.device)
        for context in sweep.context:
            make = functools.partial(_decode, preset, context, *to)
            yield Entry("paged_attention", "decode", preset, dtype, {"context": context}, make)
        yield Entry("append_kv", "rows", preset, dtype, {}, functools.partial(_append, preset, *to))
        for context, k in itertools.product(sweep.context, sweep.k):
            make = functools.partial(_merge, preset, context, k, *to)
            yield Entry("merge_states", "rows", preset, dtype, {"context": context, "k": k}, make)
