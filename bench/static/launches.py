"""Backend calls whose launches are compiled for every architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import refrag_kernels as rk
from refrag_kernels.triton_kernels import attention, chunk_rows, paged, pooling, projection

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass
class Case:
    """A call, and the requirements on the kernels that it launches."""

    name: str
    dtype: torch.dtype
    call: Callable[[], object]
    always: bool = False  # part of `make test`
    head_dim: int = 0  # 0 if the kernel has none
    spills_reported: bool = False  # rather than treated as an error

    def __str__(self):
        return self.name


def _attention(head_dim: int, group: int, dtype: torch.dtype, short_kv: bool = False, **options) -> Case:
    # Softcap and sinks give the largest variant of the kernels, but a rare one, which has separate cases.
    softcap, sinks = (30.0, torch.zeros(2 * group)) if options.pop("softcap", False) else (0.0, None)

    def call():
        if short_kv:  # as in the chunk encoder
            plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[16] * 8]), rk.ChunkMask.diagonal(), causal=False)
        else:  # a prefix that many passages attend to: its keys are split over several work items
            mask = rk.ChunkMask.passages(torch.tensor([-1, *range(15)]))
            plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[64] * 16]), mask)
        rows = plan.q_row_block.shape[0]
        q, kv = torch.empty(rows, 2 * group, head_dim, dtype=dtype), torch.empty(rows, 2, head_dim, dtype=dtype)
        out, lse = attention.mixed_attention(q, kv, kv, plan.tensors(), 0.1, softcap, sinks)
        attention.mixed_attention_backward(q, lse, q, kv, kv, out, lse, plan.tensors(), 0.1, softcap, sinks)

    name = f"attention-{str(dtype)[6:]}-D{head_dim}-group{group}{'-softcap' * bool(softcap)}{'-short_kv' * short_kv}"
    return Case(name, dtype, call, spills_reported=head_dim == 256 or dtype == _FP32, head_dim=head_dim, **options)


def _received(head_dim: int, group: int, dtype: torch.dtype, softcap: float = 0.0, **options) -> Case:
    def call():
        mask = rk.ChunkMask.passages(torch.tensor([-1, *range(15)]))  # the keys of the prefix are split
        plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[64] * 16]), mask)
        q, k = torch.empty(1024, 2 * group, head_dim, dtype=dtype), torch.empty(1024, 2, head_dim, dtype=dtype)
        attention.attention_received(q, k, torch.empty(1024, 2 * group), plan.tensors(), 0.1, softcap)

    name = f"received-{str(dtype)[6:]}-D{head_dim}-group{group}{'-softcap' * bool(softcap)}"
    return Case(name, dtype, call, spills_reported=dtype == _FP32, head_dim=head_dim, **options)


def _projection(rows: int, dtype: torch.dtype, backward: bool = False, **options) -> Case:
    def call():
        chunks, table = torch.empty(rows, 768, dtype=dtype), torch.empty(32000, 4096, dtype=dtype)
        w1, w2 = torch.empty(4096, 768, dtype=dtype), torch.empty(4096, 4096, dtype=dtype)
        b1, b2 = torch.empty(4096, dtype=dtype), torch.empty(4096, dtype=dtype)
        ids, slots = torch.zeros(2 * rows, dtype=torch.int64), torch.zeros(2 * rows, dtype=torch.int32)
        projection.embed_mixed(ids, table, chunks, slots, w1, b1, w2, b2, "gelu", 1.0, None)
        if backward:
            projection.project_chunks_backward(torch.empty(rows, 4096, dtype=dtype), chunks, w1, b1, w2, b2, "gelu")

    name = f"projection-{str(dtype)[6:]}-N{rows}{'-backward' if backward else ''}"
    return Case(name, dtype, call, **options)


def _pooling(dtype: torch.dtype, **options) -> Case:
    def call():
        hidden, offsets = torch.empty(64, 768, dtype=dtype), torch.arange(0, 65, 16, dtype=torch.int32)
        pooling.pool_chunks_backward(pooling.pool_chunks(hidden, offsets, "mean"), offsets, "mean", 64)

    return Case(f"pooling-{str(dtype)[6:]}", dtype, call, **options)


def _chunk_rows(head_dim: int, dtype: torch.dtype, rotated: bool = False, **options) -> Case:
    def call():
        k, offsets = torch.empty(64, 2, head_dim, dtype=dtype), torch.arange(0, 65, 16, dtype=torch.int32)
        table = torch.empty(64, head_dim // 2) if rotated else None
        chunk_rows.select_chunk_rows(k, k, offsets, torch.arange(5, dtype=torch.int32), 4, None, table, table)

    name = f"chunk_rows-{str(dtype)[6:]}-D{head_dim}{'-rotated' * rotated}"
    return Case(name, dtype, call, head_dim=head_dim, **options)


def _paged(head_dim: int, group: int, dtype: torch.dtype, rows: int, visible: bool = False, **options) -> Case:
    def call():
        q = torch.empty(4 * rows, 2 * group, head_dim, dtype=dtype)
        pages = torch.empty(64, 16, 2, head_dim, dtype=dtype)
        table, lengths = torch.zeros(4, 512, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        offsets = torch.zeros(5, dtype=torch.int32)
        ranges = (torch.zeros(4 * rows + 1, dtype=torch.int32), torch.zeros(9, 2, dtype=torch.int32))
        seen = ranges if visible else (None, None)
        q_offsets = None if rows == 1 else offsets
        out, lse = paged.paged_attention(
            q, pages, pages, table, lengths, q_offsets, *seen, 0.1, 0.0, -1, -1, None
        )  # fmt: skip
        new = torch.empty(4 * rows, 2, head_dim, dtype=dtype)
        paged.append_kv(new, new, pages, pages, table, lengths, offsets)
        paged.merge_states_backward(out, lse, out, lse, *paged.merge_states(out, lse, out, lse))

    name = f"paged-{str(dtype)[6:]}-D{head_dim}-group{group}-rows{rows}{'-visible' if visible else ''}"
    return Case(name, dtype, call, spills_reported=head_dim == 256 or dtype == _FP32, head_dim=head_dim, **options)


CASES = [
    *(
        _attention(head_dim, group, dtype, always=dtype == _BF16 and head_dim == 128 and group == 4)
        for head_dim in (64, 96, 128, 256)
        for dtype in (_BF16, _FP16, _FP32)
        # Each way of filling tiles with heads, in bfloat16; float16 uses the same kernels.
        for group in {_BF16: (1, 2, 4, 8), _FP16: (4,), _FP32: (1, 4)}[dtype]
    ),
    *(
        _attention(head_dim, group, _BF16, softcap=True, always=head_dim == 128 and group == 4)
        for head_dim, group in ((64, 1), (64, 4), (96, 1), (96, 4), (128, 1), (128, 2), (128, 4), (128, 8))
    ),
    *(
        _attention(head_dim, group, dtype, short_kv=True, always=dtype == _BF16 and head_dim == 64 and group == 1)
        for head_dim in (64, 96, 128, 256)
        for dtype in (_BF16, _FP16, _FP32)
        for group in ((1, 4) if dtype == _BF16 else (1,))
    ),
    _attention(64, 1, _BF16, short_kv=True, softcap=True),
    *(
        _received(head_dim, 4, dtype, always=dtype == _BF16 and head_dim == 128)
        for head_dim in (64, 96, 128, 256)
        for dtype in (_BF16, _FP16, _FP32)
    ),
    *(_received(head_dim, 4, _BF16, softcap=30.0) for head_dim in (64, 128, 256)),
    *(
        _projection(rows, dtype, always=rows == 512 and dtype == _BF16)
        for rows in (8, 48, 200, 512)
        for dtype in (_BF16, _FP16, _FP32)
    ),
    *(_projection(512, dtype, backward=True) for dtype in (_BF16, _FP32)),
    *(
        _paged(head_dim, 8, dtype, rows, always=dtype == _BF16 and head_dim == 128 and rows == 1)
        for head_dim in (64, 96, 128, 256)
        for rows in (1, 32)
        for dtype in (_BF16, _FP16, _FP32)
    ),
    _paged(128, 1, _BF16, 1, visible=True),
    _paged(128, 4, _BF16, 32, visible=True),
    *(
        _chunk_rows(head_dim, dtype, rotated, always=dtype == _BF16 and head_dim == 128 and rotated)
        for head_dim in (64, 96, 128, 256)
        for dtype in (_BF16, _FP32)
        for rotated in (False, True)
    ),
    *(_pooling(dtype, always=dtype == _BF16) for dtype in (_BF16, _FP32)),
]
