"""Kernels for compressed retrieval-augmented decoding: torch ops over mixed sequences of text and chunk embeddings."""

from refrag_kernels import backends as backends
from refrag_kernels.attention import attention_received, mixed_attention
from refrag_kernels.chunk_rows import kept_offsets, select_chunk_rows
from refrag_kernels.layout import ChunkLayout
from refrag_kernels.linear import linear_rows
from refrag_kernels.mask import ChunkMask
from refrag_kernels.paged import append_kv, merge_states, paged_attention
from refrag_kernels.plan import AttentionPlan, PlanCapacity, plan_attention
from refrag_kernels.pooling import pool_chunks
from refrag_kernels.projection import PackedProjection, embed_mixed, project_chunks
from refrag_kernels.selection import use_backend
from refrag_kernels.version import __version__ as __version__
from refrag_kernels.visible import VisibleRanges, visible_ranges

__all__ = [
    "AttentionPlan",
    "ChunkLayout",
    "ChunkMask",
    "PackedProjection",
    "PlanCapacity",
    "VisibleRanges",
    "append_kv",
    "attention_received",
    "embed_mixed",
    "kept_offsets",
    "linear_rows",
    "merge_states",
    "mixed_attention",
    "paged_attention",
    "plan_attention",
    "pool_chunks",
    "project_chunks",
    "select_chunk_rows",
    "use_backend",
    "visible_ranges",
]
