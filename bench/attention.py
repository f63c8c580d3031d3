"""Cases of mixed_attention: passages that see themselves, causal prefill, the encoder, the backward pass; and plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import refrag_kernels as rk
from bench.case import Case, Goal, bound_of

_SHARED = 64  # rows of the prefix, and of the question


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    width: int
    rows: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} x {self.width}, {self.rows:,} rows"

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        return [torch.randn(self.rows, n, self.width, generator=generator).to(dtype) for n in counts]


def _batched(tensor: torch.Tensor) -> torch.Tensor:
    """Return [T, H, D] as SDPA wants it, [1, H, T, D]."""
    return tensor.transpose(0, 1)[None]


@dataclasses.dataclass(frozen=True)
class Passages:
    """A prefix, passages that see the prefix and themselves, a question that sees everything; not causal."""

    rows: int
    passage: int

    def lengths(self) -> list[int]:
        body = self.rows - 2 * _SHARED
        passages = [self.passage] * (body // self.passage)
        rest = body - sum(passages)
        return [_SHARED, *passages, *([rest] if rest else []), _SHARED]

    def chunk_mask(self) -> torch.Tensor:
        chunks = len(self.lengths())
        mask = torch.eye(chunks, dtype=torch.bool)
        mask[:, 0] = mask[-1] = True
        return mask

    def dense(self) -> torch.Tensor:
        lengths = torch.tensor(self.lengths())
        return self.chunk_mask().repeat_interleave(lengths, 0).repeat_interleave(lengths, 1)

    def plan(self) -> rk.AttentionPlan:
        layout = rk.ChunkLayout.from_lengths([self.lengths()])
        return rk.plan_attention(layout, rk.ChunkMask.from_dense(self.chunk_mask()), causal=False)

    def looped(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """SDPA passage by passage, the keys of prefix and passage put together."""
        starts = [0]
        for length in self.lengths():
            starts.append(starts[-1] + length)
        pieces = []
        for chunk, (start, end) in enumerate(zip(starts, starts[1:])):
            if chunk == 0:
                keys, values = k[:, :, :end], v[:, :, :end]
            elif chunk == len(starts) - 2:
                keys, values = k, v
            else:
                keys = torch.cat([k[:, :, :_SHARED], k[:, :, start:end]], 2)
                values = torch.cat([v[:, :, :_SHARED], v[:, :, start:end]], 2)
            pieces.append(F.scaled_dot_product_attention(q[:, :, start:end], keys, values, enable_gqa=True))
        return torch.cat(pieces, 2)


def _rows(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: call()[0].transpose(0, 1)


def _flex(q, k, v, passages: Passages, block: int) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(passages.lengths())
    chunk = torch.arange(len(lengths)).repeat_interleave(lengths)
    last = len(lengths) - 1

    def allowed(b, h, i, j):
        return (chunk[i] == chunk[j]) | (chunk[j] == 0) | (chunk[i] == last)

    mask = create_block_mask(allowed, None, None, passages.rows, passages.rows, device="cpu", BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def passage_cases(flex: bool) -> Iterator[Case]:
    """Cases at 6-12 %, about 25 % and all of the pairs."""
    small, large = Shape(9, 3, 64, 4096), Shape(32, 8, 64, 2048)
    goals = {
        torch.float32: {"sparse": Goal(2.0, 1.00), "quarter": Goal(1.4, 1.05), "dense": Goal(1.25, 1.08)},
        torch.bfloat16: {"sparse": Goal(4.2, 0.70), "quarter": Goal(2.5, 0.85), "dense": Goal(2.3, 0.80)},
    }
    for dtype, shape, passage, density in [
        (dtype, shape, passage, density)
        for dtype in (torch.float32, torch.bfloat16)
        for shape, passage, density in (
            (small, 128, "sparse"),
            (small, 992, "quarter"),
            (large, 128, "sparse"),
            (large, 384, "quarter"),
            (small, None, "dense"),
        )
    ]:
        q, k, v = shape.tensors(dtype)
        bq, bk, bv = (_batched(t) for t in (q, k, v))
        if passage is None:
            plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[shape.rows]]), causal=False)
            peers = {"SDPA": _rows(lambda a=(bq, bk, bv): F.scaled_dot_product_attention(*a, enable_gqa=True))}
            dense = None
        else:
            passages = Passages(shape.rows, passage)
            plan, dense = passages.plan(), passages.dense()
            peers = {
                "SDPA, passage by passage": _rows(lambda a=(bq, bk, bv), p=passages: p.looped(*a)),
                "SDPA, bool mask": _rows(
                    lambda a=(bq, bk, bv), m=dense: F.scaled_dot_product_attention(*a, m, enable_gqa=True)
                ),
            }
            if flex:
                for block in (64, 128):
                    peers[f"flex_attention, block {block}"] = _rows(_flex(bq, bk, bv, passages, block))
        pairs = plan.stats()["pairs_allowed"]

        def expected(q=q, k=k, v=v, dense=dense):
            a = [_batched(t.double()) for t in (q, k, v)]
            return F.scaled_dot_product_attention(*a, dense, enable_gqa=True)[0].transpose(0, 1)

        yield Case(
            op="mixed_attention",
            name=f"{shape}, {100 * pairs / shape.rows**2:.0f} % of pairs",
            dtype=dtype,
            ours=lambda a=(q, k, v, plan): rk.mixed_attention(*a),
            peers=peers,
            expected=expected,
            bound=bound_of(dtype),
            flops=4.0 * shape.heads * shape.width * pairs,
            goal=goals[dtype][density],
            notes="plans and block masks not counted",
        )


def causal_cases() -> Iterator[Case]:
    """The decoder's prefill: 64 rows of text and 1,024 slots, plain causal."""
    for dtype, goal in ((torch.float32, 1.25), (torch.bfloat16, 2.2)):
        for shape in (Shape(9, 3, 64, 1088), Shape(32, 8, 64, 1088)):
            q, k, v = shape.tensors(dtype)
            batched = [_batched(t) for t in (q, k, v)]
            plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[_SHARED] + [1] * 1024]))

            def sdpa(a=batched):
                return F.scaled_dot_product_attention(*a, is_causal=True, enable_gqa=True)

            def expected(a=batched):
                wide = [t.double() for t in a]
                return F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

            yield Case(
                op="mixed_attention",
                name=f"{shape}, causal",
                dtype=dtype,
                ours=lambda a=(q, k, v, plan): rk.mixed_attention(*a),
                peers={"SDPA, is_causal": _rows(sdpa)},
                expected=expected,
                bound=bound_of(dtype),
                flops=4.0 * shape.heads * shape.width * plan.stats()["pairs_allowed"],
                goal=Goal(goal),
            )


def encoder_cases() -> Iterator[Case]:
    """The chunk encoder: 512 chunks of 16 rows that see only themselves, 12 heads of 32."""
    chunks, rows, heads, width = 512, 16, 12, 32
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = Shape(heads, heads, width, chunks * rows).tensors(dtype)
        padded = [t.view(chunks, rows, heads, width).transpose(1, 2) for t in (q, k, v)]
        plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[rows] * chunks]), rk.ChunkMask.diagonal(), causal=False)

        def sdpa(a=padded):
            return F.scaled_dot_product_attention(*a).transpose(1, 2).reshape(chunks * rows, heads, width)

        def expected(a=padded):
            out = F.scaled_dot_product_attention(*[t.double() for t in a])
            return out.transpose(1, 2).reshape(chunks * rows, heads, width)

        yield Case(
            op="mixed_attention",
            name=f"encoder, {chunks} chunks of {rows}, {heads} x {width}",
            dtype=dtype,
            ours=lambda a=(q, k, v, plan): rk.mixed_attention(*a),
            peers={"SDPA, padded batch": sdpa},
            expected=expected,
            bound=bound_of(dtype),
            flops=4.0 * heads * width * chunks * rows * rows,
            goal=Goal(2.0),
        )


def backward_cases() -> Iterator[Case]:
    """Gradients of q, k and v at 12 % of the pairs."""
    shape, passages = Shape(32, 8, 64, 2048), Passages(2048, 128)
    plan, dense = passages.plan(), passages.dense()
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.requires_grad_() for t in shape.tensors(dtype)]
        upstream = torch.randn(shape.rows, shape.heads, shape.width).to(dtype)
        ours = rk.mixed_attention(*leaves, plan)
        theirs = passages.looped(*[_batched(t) for t in leaves])[0].transpose(0, 1)

        def expected(leaves=leaves, upstream=upstream):
            wide = [t.detach().double().requires_grad_() for t in leaves]
            out = F.scaled_dot_product_attention(*[_batched(t) for t in wide], dense, enable_gqa=True)
            return torch.autograd.grad(out[0].transpose(0, 1), wide, upstream.double())

        def gradients(out, leaves=leaves, upstream=upstream):
            return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        yield Case(
            op="mixed_attention",
            name=f"backward, {shape}, 12 % of pairs",
            dtype=dtype,
            ours=gradients(ours),
            peers={"SDPA, passage by passage": gradients(theirs)},
            expected=expected,
            bound=8e-6 if dtype == torch.float32 else 8e-3,
            flops=10.0 * shape.heads * shape.width * plan.stats()["pairs_allowed"],
            goal=Goal(2.0),
        )


def plan_cases() -> Iterator[Case]:
    """The plan, against flex_attention's block mask for the same chunks."""
    from torch.nn.attention.flex_attention import create_block_mask

    passages = Passages(4096, 128)
    layout = rk.ChunkLayout.from_lengths([passages.lengths()])
    mask = rk.ChunkMask.from_dense(passages.chunk_mask())
    lengths = torch.tensor(passages.lengths())
    chunk, last = torch.arange(len(lengths)).repeat_interleave(lengths), len(lengths) - 1

    def allowed(b, h, i, j):
        return (chunk[i] == chunk[j]) | (chunk[j] == 0) | (chunk[i] == last)

    def block_mask():
        return create_block_mask(allowed, None, None, 4096, 4096, device="cpu", BLOCK_SIZE=128)

    yield Case(
        op="plan_attention",
        name="4,096 rows, passages of 128",
        dtype=torch.int32,
        ours=lambda: rk.plan_attention(layout, mask, causal=False),
        peers={"create_block_mask, block 128": block_mask},
        goal=Goal(50.0),
    )
