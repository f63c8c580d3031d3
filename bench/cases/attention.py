"""Cases of attention_received, and of mixed_attention: prompts, passages, the encoder, the backward pass and more."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

import refrag_kernels as rk
from bench.cases import peers, problems, wheels
from bench.cases.presets import PRESETS
from bench.cases.problems import Problem, of_passages
from bench.cases.prompts import Passages, Prompt
from bench.engine.case import OURS, Case, Entry, Skip, Sweep, bound_of
from refrag_kernels import backends

# Blocks of 64 need more shared memory than an H100 has.
FLEX_BLOCKS = {"cpu": (64, 128), "cuda": (128,)}
MASKS: dict[str, Callable[[int], Problem]] = {
    "causal": problems.causal,
    "documents": problems.documents,
    "blocks": problems.blocks,
    "interleaved": problems.interleaved,
    "random_passages": problems.random_passages,
}


def tensors(heads: int, kv_heads: int, head_dim: int, rows: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return q, k and v."""
    generator = torch.Generator(device).manual_seed(0)
    counts = (heads, kv_heads, kv_heads)
    return [torch.randn(rows, n, head_dim, generator=generator, device=device).to(dtype) for n in counts]


def _prompt(preset: str, context: int, k: int, expand: float, dtype: torch.dtype, device: str) -> Case:
    shape, layout = PRESETS[preset], Prompt(context, k, expand).layout()
    q, key, v = tensors(shape.heads, shape.kv_heads, shape.head_dim, layout.total_rows, dtype, device)
    plan = rk.plan_attention(layout, device=device)
    causal = torch.ones(layout.total_rows, layout.total_rows, dtype=torch.bool, device=device).tril()
    return Case(
        ours=lambda: rk.mixed_attention(q, key, v, plan),
        peers={
            "SDPA, is_causal": peers.sdpa(q, key, v, is_causal=True),
            "eager": peers.eager(q, key, v, causal),
            **peers.dense_libraries(q, key, v, causal=True),
        },
        plans={OURS: lambda: rk.plan_attention(layout, device=device)},
        expected=peers.sdpa_float64(q, key, v, is_causal=True),
        bound=bound_of(dtype),
        flops=4.0 * shape.heads * shape.head_dim * plan.stats()["pairs_allowed"],
        limit="matmul",
        notes="plan not counted",
    )


def _passages(preset: str, context: int, k: int, density: float, dtype: torch.dtype, device: str, flex: bool) -> Case:
    shape = PRESETS[preset]
    q, key, v = tensors(shape.heads, shape.kv_heads, shape.head_dim, context, dtype, device)
    if density == 1:
        plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[context]]), causal=False, device=device)
        dense, others = None, {"SDPA": peers.sdpa(q, key, v), **peers.dense_libraries(q, key, v, causal=False)}
        plans = {}
    else:
        passages = Passages(context, k, density)
        plan, dense, problem = passages.plan(device), passages.dense().to(device), of_passages(passages)
        others = {
            "SDPA, passage by passage": peers.sdpa_in_pieces(q, key, v, problem),
            "SDPA, bool mask": peers.sdpa(q, key, v, dense),
            "eager": peers.eager(q, key, v, dense),
            **(peers.masked_libraries(q, key, v, problem) if device == "cuda" else {}),
        }
        blocks = FLEX_BLOCKS[device] if flex else ()
        others |= {f"flex_attention, block {block}": peers.flex_late(q, key, v, problem, block) for block in blocks}
        plans = plans_of(problem, q, key, v, blocks)
    return Case(
        ours=lambda: rk.mixed_attention(q, key, v, plan),
        peers=others,
        expected=peers.sdpa_float64(q, key, v, dense),
        bound=bound_of(dtype),
        flops=4.0 * shape.heads * shape.head_dim * plan.stats()["pairs_allowed"],
        limit="matmul",
        plans=plans,
        notes="excludes plans and block masks",
    )


def plans_of(problem: Problem, q, key, v, blocks: Sequence[int]) -> dict[str, Callable[[], object]]:
    """Return the functions that make each contender's plan or block mask."""
    device = q.device.type
    plans: dict[str, Callable[[], object]] = {OURS: lambda: problem.plan(device)}
    for block in blocks:
        plans[f"flex_attention, block {block}"] = lambda block=block: peers.block_mask(problem, block, device)
    if device == "cuda":
        plans["cuDNN flex_attention"] = lambda: wheels.cudnn_flex_plan(q, key, v, problem)
    return plans


def _masked(
    make: Callable[[int], Problem], preset: str, rows: int, dtype: torch.dtype, device: str, flex: bool
) -> Case:
    """Build the case of a mask from ``bench.cases.problems``."""
    shape, problem = PRESETS[preset], make(rows)
    q, key, v = tensors(shape.heads, shape.kv_heads, shape.head_dim, rows, dtype, device)
    plan = problem.plan(device)
    others: dict[str, Callable[[], torch.Tensor]] = {}
    pieces = problem.pieces or ()
    if len(pieces) == 1:
        others["SDPA, is_causal"] = peers.sdpa(q, key, v, is_causal=True)
        others |= peers.dense_libraries(q, key, v, causal=True)
    elif pieces and problem.keys_of_pieces() is None:
        others["SDPA, document by document"] = peers.sdpa_in_pieces(q, key, v, problem)
    elif rows <= 4096:  # beyond this, masks and scores of all pairs don't fit
        others["SDPA, bool mask"] = peers.sdpa(q, key, v, problem.visible(0, rows, device))
    others |= peers.masked_libraries(q, key, v, problem) if device == "cuda" else {}
    blocks = (128,) if flex else ()
    others |= {f"flex_attention, block {block}": peers.flex_late(q, key, v, problem, block) for block in blocks}
    return Case(
        ours=lambda: rk.mixed_attention(q, key, v, plan),
        peers=others,
        expected=peers.exact(q, key, v, problem),
        bound=bound_of(dtype),
        flops=4.0 * shape.heads * shape.head_dim * plan.stats()["pairs_allowed"],
        limit="matmul",
        plans=plans_of(problem, q, key, v, blocks),
        notes="excludes plans and block masks",
    )


def _encoder(preset: str, context: int, k: int, dtype: torch.dtype, device: str) -> Case:
    shape, chunks = PRESETS[preset], context // k
    if chunks < 1:
        raise Skip(f"a context of {context} has no chunk of {k}")
    heads, head_dim = shape.encoder_heads, shape.encoder_hidden_size // shape.encoder_heads
    q, key, v = tensors(heads, heads, head_dim, chunks * k, dtype, device)
    padded = [t.view(chunks, k, heads, head_dim).transpose(1, 2) for t in (q, key, v)]
    layout = rk.ChunkLayout.from_lengths([[k] * chunks])
    plan = rk.plan_attention(layout, rk.ChunkMask.diagonal(), causal=False, device=device)

    def sdpa(a: list[torch.Tensor]) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(*a)
        return out.transpose(1, 2).reshape(chunks * k, heads, head_dim)

    return Case(
        ours=lambda: rk.mixed_attention(q, key, v, plan),
        peers={"SDPA, padded batch": lambda: sdpa(padded)},
        expected=lambda: sdpa([t.double() for t in padded]),
        bound=bound_of(dtype),
        flops=4.0 * heads * head_dim * chunks * k * k,
        limit="matmul",
    )


def _backward(preset: str, context: int, k: int, density: float, dtype: torch.dtype, device: str) -> Case:
    shape, passages = PRESETS[preset], Passages(context, k, density)
    plan, dense = passages.plan(device), passages.dense().to(device)
    leaves = [t.requires_grad_() for t in tensors(shape.heads, shape.kv_heads, shape.head_dim, context, dtype, device)]
    upstream = tensors(shape.heads, 1, shape.head_dim, context, dtype, device)[0].flip(0)

    def gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    @functools.cache
    def ours(backend: str | None) -> torch.Tensor:
        return rk.mixed_attention(*leaves, plan, backend=backend)

    @functools.cache
    def theirs() -> torch.Tensor:
        return peers.sdpa_in_pieces(*leaves, of_passages(passages))()

    def expected() -> tuple[torch.Tensor, ...]:
        wide = [t.detach().double().requires_grad_() for t in leaves]
        return torch.autograd.grad(peers.sdpa(*wide, dense)(), wide, upstream.double())

    return Case(
        ours=lambda: gradients(ours(backends.effective_backend(None))),
        peers={"SDPA, passage by passage": lambda: gradients(theirs())},
        expected=expected,
        bound=8e-6 if dtype == torch.float32 else 8e-3,
        flops=10.0 * shape.heads * shape.head_dim * plan.stats()["pairs_allowed"],
        limit="matmul",
        grad=True,
        notes="the backward pass alone",
    )


def _received(preset: str, context: int, dtype: torch.dtype, device: str) -> Case:
    """The attention that each row of a causal text received, after its forward pass."""
    shape = PRESETS[preset]
    q, key, v = tensors(shape.heads, shape.kv_heads, shape.head_dim, context, dtype, device)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[context]]), device=device)
    _, lse = rk.mixed_attention(q, key, v, plan, return_lse=True)
    group = shape.heads // shape.kv_heads

    def column_sums(q: torch.Tensor, key: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        causal = torch.ones(context, context, dtype=torch.bool, device=device).tril()
        received = torch.zeros(context, shape.kv_heads, dtype=lse.dtype, device=device)
        for head in range(shape.heads):  # the scores of all heads may not fit
            scores = (q[:, head] @ key[:, head // group].T).to(lse.dtype) * shape.head_dim**-0.5
            received[:, head // group] += (scores - lse[:, head, None]).exp().masked_fill(~causal, 0).sum(0)
        return received

    return Case(
        ours=lambda: rk.attention_received(q, key, lse, plan),
        peers={"eager, head by head": lambda: column_sums(q, key, lse)},
        expected=lambda: column_sums(q.double(), key.double(), lse.double()),
        bound=bound_of(dtype) if dtype != torch.float32 else 5e-6,
        flops=2.0 * shape.heads * shape.head_dim * plan.stats()["pairs_allowed"],
        limit="matmul",
        notes="excludes the plan and the forward pass",
    )


def entries(sweep: Sweep, flex: bool) -> Iterator[Entry]:
    """Yield the rows of mixed_attention and attention_received."""
    common = itertools.product(sweep.presets, sweep.context, sweep.k, sweep.dtypes)
    for preset, context, k, dtype in common:
        at, to = {"context": context, "k": k}, (dtype, sweep.device)
        for expand in sweep.expand:
            make = functools.partial(_prompt, preset, context, k, expand, *to)
            yield Entry("mixed_attention", "prompt", preset, dtype, {**at, "expand": expand}, make)
        for density in sweep.density:
            make = functools.partial(_passages, preset, context, k, density, *to, flex)
            yield Entry("mixed_attention", "passages", preset, dtype, {**at, "density": density}, make)
        yield Entry(
            "mixed_attention", "encoder", preset, dtype, at, functools.partial(_encoder, preset, context, k, *to)
        )
        for density in sweep.density:
            if density < 1:
                make = functools.partial(_backward, preset, context, k, density, *to)
                yield Entry("mixed_attention", "backward", preset, dtype, {**at, "density": density}, make)
    for preset, context, dtype in itertools.product(sweep.presets, sweep.context, sweep.dtypes):
        for case, mask in MASKS.items():
            make = functools.partial(_masked, mask, preset, context, dtype, sweep.device, flex)
            yield Entry("mixed_attention", case, preset, dtype, {"context": context}, make, on_request=True)
        make = functools.partial(_received, preset, context, dtype, sweep.device)
        yield Entry("attention_received", "text", preset, dtype, {"context": context}, make)
