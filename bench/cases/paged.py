"""Cases of append_kv and merge_states."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch

import refrag_kernels as rk
from bench.cases import decoding
from bench.cases.presets import PRESETS
from bench.engine.case import Case, Entry, Sweep, bound_of

_ROWS = 64  # per prefill chunk written by append_kv


def _append(preset: str, dtype: torch.dtype, device: str) -> Case:
    shape = PRESETS[preset]
    blocks = _ROWS // decoding.PAGE
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(_ROWS, shape.kv_heads, shape.head_dim, generator=generator).to(device, dtype) for _ in range(2))
    table = torch.randperm(4 * blocks, generator=generator)[:blocks].to(device, torch.int32)[None]
    lengths = torch.tensor([_ROWS], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, _ROWS], dtype=torch.int32, device=device)
    ours, theirs, exact = (decoding.cache(shape.kv_heads, shape.head_dim, 4 * blocks, dtype, device) for _ in range(3))
    row = torch.arange(_ROWS, device=device)
    page, place = table[0, row // decoding.PAGE].long(), row % decoding.PAGE

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
    a, b = (torch.randn(rows, shape.heads, shape.head_dim, generator=generator).to(device, dtype) for _ in range(2))
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
        yield Entry("append_kv", "rows", preset, dtype, {}, functools.partial(_append, preset, *to))
        for context, k in itertools.product(sweep.context, sweep.k):
            make = functools.partial(_merge, preset, context, k, *to)
            yield Entry("merge_states", "rows", preset, dtype, {"context": context, "k": k}, make)
