"""Kernels for compressed retrieval-augmented decoding: torch ops over mixed sequences of text and chunk embeddings."""

from refrag_kernels import backends as backends
from refrag_kernels.attention import mixed_attention
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
    "embed_mixed",
    "linear_rows",
    "merge_states",
    "mixed_attention",
    "paged_attention",
    "plan_attention",
    "pool_chunks",
    "project_chunks",
    "use_backend",
    "visible_ranges",
]
