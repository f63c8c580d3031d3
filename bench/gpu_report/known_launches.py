"""Calls with LLaMA-3-8B's shapes that the report examines: passages, a prompt, and a decode step."""

from __future__ import annotations

from collections.abc import Callable

import torch

import refrag_kernels as rk
from bench.cases.attention import tensors
from bench.cases.presets import PRESETS
from bench.cases.prompts import Passages, Prompt

_PAGE = 16


def passages(device: str, rows: int = 4096, preset: str = "llama3-8b", backend: str | None = "triton") -> Callable:
    """Return the forward pass over passages with a density of 12 %."""
    return _attention(Passages(rows, 16, 0.12).plan(device), rows, preset, device, backend)


def prompt(device: str, context: int = 4096, preset: str = "llama3-8b", backend: str | None = "triton") -> Callable:
    """Return the forward pass over a prompt whose context is compressed to slots of 16 tokens."""
    layout = Prompt(context, 16, 0.0).layout()
    plan = rk.plan_attention(layout, device=device)
    return _attention(plan, layout.total_rows, preset, device, backend)


def decode(device: str, context: int = 4096, preset: str = "llama3-8b", backend: str | None = "triton") -> Callable:
    """Return a decode step: one row over ``context`` keys in pages of 16."""
    shape, pages = PRESETS[preset], -(-context // _PAGE)
    k, v = (torch.randn(pages, _PAGE, shape.kv_heads, shape.head_dim).to(device, torch.bfloat16) for _ in range(2))
    q = torch.randn(1, shape.heads, shape.head_dim).to(device, torch.bfloat16)
    table = torch.randperm(pages).to(device, torch.int32)[None]
    lengths = torch.tensor([context], dtype=torch.int32, device=device)
    return lambda: rk.paged_attention(q, k, v, table, lengths, backend=backend)


def _attention(plan: rk.AttentionPlan, rows: int, preset: str, device: str, backend: str | None) -> Callable:
    shape = PRESETS[preset]
    q, k, v = tensors(shape.heads, shape.kv_heads, shape.head_dim, rows, torch.bfloat16, device)
    return lambda: rk.mixed_attention(q, k, v, plan, backend=backend)


CALLS = {"passages": passages, "prompt": prompt, "decode": decode}
