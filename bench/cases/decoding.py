"""Cases of paged_attention: a decode step of one or many sequences, with a page table that may be wider than needed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import refrag_kernels as rk
from bench.cases.presets import PRESETS
from bench.engine.case import Case, Entry, Skip, Sweep, bound_of
from refrag_kernels import backends

PAGE = 16
_COLD = 1 << 29  # total bytes of keys and values: larger than the caches


def cache(heads: int, head_dim: int, pages: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pages of random keys and values."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (pages, PAGE, heads, head_dim)
    k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return k, v


def _decode(preset: str, context: int, batch: int, table: int, dtype: torch.dtype, device: str) -> Case:
    """One row and ``context`` keys per sequence; calls rotate through batches, so that keys come from memory."""
    shape, blocks = PRESETS[preset], -(-context // PAGE)
    if 0 < table < context:
        raise Skip(f"{context} keys do not fit in a table for {table}")
    columns = max(blocks, -(-table // PAGE))
    size = 2 * context * shape.kv_heads * shape.head_dim * dtype.itemsize * batch
    batches = max(1 if size > _COLD else 2, -(-_COLD // size))
    k_pages, v_pages = cache(shape.kv_heads, shape.head_dim, batches * batch * blocks, dtype, device)
    order = torch.randperm(batches * batch * blocks, generator=torch.Generator().manual_seed(1))
    tables = torch.zeros(batches, batch, columns, dtype=torch.int32)
    tables[:, :, :blocks] = order.view(batches, batch, blocks)
    tables = tables.to(device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(batch, shape.heads, shape.head_dim, generator=generator).to(device, dtype)
    turns: dict[str | None, int] = {}

    def turn(name: str | None) -> int:
        turns[name] = (turns.get(name, -1) + 1) % batches
        return turns[name]

    def whole(pages: torch.Tensor, at: int) -> torch.Tensor:
        """Return a batch's contiguous keys, [B, H_kv, T, D]."""
        return pages[tables[at, :, :blocks].long()].flatten(1, 2)[:, :context].transpose(1, 2)

    # SDPA has no pages: it gets each batch's keys as one contiguous tensor.
    pieces = [[whole(pages, at) for pages in (k_pages, v_pages)] for at in range(batches)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def ours() -> torch.Tensor:
        return rk.paged_attention(q, k_pages, v_pages, tables[turn(backends.effective_backend(None))], lengths)

    def contiguous() -> torch.Tensor:
        return attend(q, *pieces[turn("SDPA")])

    def gathered() -> torch.Tensor:
        at = turn("gather")
        return attend(q, whole(k_pages, at), whole(v_pages, at))

    def expected() -> torch.Tensor:
        # Every contender's first call reads the first batch; that is the call that is checked.
        each = ((q[n : n + 1].double(), *(t[n : n + 1].double() for t in pieces[0])) for n in range(batch))
        return torch.cat([attend(*one) for one in each])

    return Case(
        ours=ours,
        peers={"SDPA, contiguous keys": contiguous, "gather pages, SDPA": gathered},
        expected=expected,
        bound=bound_of(dtype),
        flops=4.0 * shape.heads * shape.head_dim * context * batch,
        bytes=float(size),
        limit="read",
        max_copies=1,  # it rotates through its batches
    )


def entries(sweep: Sweep) -> Iterator[Entry]:
    """Yield the rows of paged_attention."""
    for preset, dtype, context in itertools.product(sweep.presets, sweep.dtypes, sweep.context):
        to = (dtype, sweep.device)
        make = functools.partial(_decode, preset, context, 1, 0, *to)
        yield Entry("paged_attention", "decode", preset, dtype, {"context": context}, make)
        for batch, table in itertools.product(sweep.batch, sweep.table):
            at = {"context": context, "batch": batch, "table": table}
            make = functools.partial(_decode, preset, context, batch, table, *to)
            yield Entry("paged_attention", "batch", preset, dtype, at, make, on_request=True)
