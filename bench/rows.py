"""Cases of embed_mixed and paged_attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import refrag_kernels as rk
from bench.case import Case, Goal, bound_of


def projection_cases() -> Iterator[Case]:
    """Projection 384 -> 576 of N chunks into a mixed sequence with half as many rows of text."""
    goals = {torch.float32: {256: 1.15, 4096: 1.1}, torch.bfloat16: {256: 1.6, 4096: 1.35}}
    d_enc, d_dec = 384, 576
    for dtype in (torch.float32, torch.bfloat16):
        first, second = torch.nn.Linear(d_enc, d_dec).to(dtype), torch.nn.Linear(d_dec, d_dec).to(dtype)
        table = torch.randn(32000, d_dec).to(dtype)
        weights = [t.detach() for t in (first.weight, first.bias, second.weight, second.bias)]
        packed = rk.PackedProjection.from_weights(*weights)
        for count in (256, 4096):
            text = count // 2 + 64
            chunks = torch.randn(count, d_enc).to(dtype)
            order = torch.randperm(count + text)
            slots, texts = order[:count].sort().values, order[count:].sort().values
            ids = torch.zeros(count + text, dtype=torch.int64)
            ids[texts] = torch.randint(0, 32000, (text,))
            slot_of_row = torch.full((count + text,), -1, dtype=torch.int32)
            slot_of_row[slots] = torch.arange(count, dtype=torch.int32)

            def eager(a=(chunks, table, ids[texts], slots, texts, *weights)):
                chunks, table, text_ids, slots, texts, w1, b1, w2, b2 = a
                out = torch.empty(len(slots) + len(texts), table.shape[1], dtype=table.dtype)
                out.index_copy_(0, slots, F.linear(F.gelu(F.linear(chunks, w1, b1)), w2, b2))
                return out.index_copy_(0, texts, table[text_ids])

            def expected(a=(chunks, table, ids[texts], slots, texts, *weights), eager=eager):
                return eager([t.double() if t.is_floating_point() else t for t in a])

            yield Case(
                op="embed_mixed",
                name=f"{d_enc} -> {d_dec}, {count:,} chunks, {text:,} rows of text",
                dtype=dtype,
                ours=lambda a=(ids, table, chunks, slot_of_row, packed): rk.embed_mixed(*a),
                peers={"Linear, GELU, Linear, gather, scatter": eager},
                expected=expected,
                bound=bound_of(dtype),
                flops=2.0 * count * (d_enc * d_dec + d_dec * d_dec),
                goal=Goal(goals[dtype][count]),
            )


def paged_cases() -> Iterator[Case]:
    """Decoding: one row, 4,096 keys in pages of 16, 32/8 heads of 128."""
    keys, page, heads, kv_heads, width = 4096, 16, 32, 8, 128
    for dtype in (torch.float32, torch.bfloat16):
        # More sequences than the caches hold, read in turns: keys and values come from memory, as in a real decoder.
        sequences = 12
        pages = sequences * keys // page
        k_pages, v_pages = (torch.randn(pages, page, kv_heads, width).to(dtype) for _ in range(2))
        tables = torch.randperm(pages).to(torch.int32).view(sequences, 1, keys // page)
        lengths = torch.tensor([keys], dtype=torch.int32)
        q = torch.randn(1, heads, width).to(dtype)
        turns = {"ours": 0, "SDPA": 0}

        def turn(name, turns=turns, sequences=sequences):
            turns[name] = (turns[name] + 1) % sequences
            return turns[name]

        def ours(a=(q, k_pages, v_pages), tables=tables, lengths=lengths, turn=turn):
            return rk.paged_attention(*a, tables[turn("ours")], lengths)

        # SDPA has no pages: it is given each sequence's keys in one piece, [1, H_kv, T, D].
        k_whole, v_whole = (
            t[tables.long()].reshape(sequences, 1, keys, kv_heads, width).transpose(2, 3) for t in (k_pages, v_pages)
        )

        def sdpa(q=q[:, :, None], k=k_whole, v=v_whole, turn=turn):
            at = turn("SDPA")
            return F.scaled_dot_product_attention(q, k[at], v[at], enable_gqa=True)[:, :, 0]

        def expected(q=q, k=k_whole, v=v_whole):
            args = (q[:, :, None].double(), k[1].double(), v[1].double())
            return F.scaled_dot_product_attention(*args, enable_gqa=True)[:, :, 0]

        yield Case(
            op="paged_attention",
            name=f"one row, {keys:,} keys, {heads}/{kv_heads} x {width}",
            dtype=dtype,
            ours=ours,
            peers={"SDPA, contiguous keys": sdpa},
            expected=expected,
            bound=bound_of(dtype),
            flops=4.0 * heads * width * keys,
            bytes=2.0 * keys * kv_heads * width * dtype.itemsize,
            goal=Goal(share_of_bandwidth=0.75),
        )
