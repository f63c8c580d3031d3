"""select_chunk_rows on GPUs by Triton."""

from __future__ import annotations

import torch

from refrag_kernels.triton_kernels import launch
from refrag_kernels.triton_kernels.chunk_rows_kernels import select_chunk_rows_fwd_kernel, unlike_mean_kernel

_ROWS = 16  # per iteration: chunks have 1 to 32


def select_chunk_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    chunk_offsets: torch.Tensor,
    kept_offsets: torch.Tensor,
    num_kept: int,
    scores: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``refrag_kernels.select_chunk_rows``."""
    rows, heads, columns = k.shape
    chunks = chunk_offsets.shape[0] - 1
    k_kept, v_kept = (torch.empty(num_kept, heads, columns, dtype=k.dtype, device=k.device) for _ in range(2))
    kept_rows = torch.empty(num_kept, heads, dtype=torch.int32, device=k.device)
    if not kept_rows.numel():
        return k_kept, v_kept, kept_rows
    block_d = launch.width(columns)
    # A warp for each 128 bytes of a row: with fewer, float32 spills.
    shape = dict(D=columns, BD=block_d, BLOCK_M=_ROWS, num_warps=max(1, block_d * k.element_size() // 128))
    chunk_offsets = chunk_offsets.contiguous()
    with launch.on(k.device):
        if scores is None:
            scores = torch.empty(rows, heads, dtype=torch.float32, device=k.device)
            cos, sin, half = (scores, scores, 0) if cos is None or sin is None else (cos, sin, cos.shape[1])
            if chunks:
                unlike_mean_kernel[(chunks, heads)](
                    k, cos, sin, chunk_offsets, scores, rows, *k.stride()[:2], cos.stride(0), sin.stride(0),
                    HALF=half, **shape,
                )  # fmt: skip
        select_chunk_rows_fwd_kernel[(chunks + 1, heads)](
            k, v, chunk_offsets, kept_offsets.contiguous(), scores, k_kept, v_kept, kept_rows, rows, num_kept,
            *k.stride()[:2], *v.stride()[:2], *scores.stride(), **shape,
        )  # fmt: skip
    return k_kept, v_kept, kept_rows
