"""Random layouts, masks and attention problems, each generated from a seed that failing tests print."""

import dataclasses
import random
from collections.abc import Sequence

import torch

import refrag_kernels as rk
from refrag_kernels.reference.mask import allowed_pairs

# Sizes around the tile of 16 rows, and the paper's chunk sizes.
CHUNK_LENGTHS = (1, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40)
MASKS = ("full", "passages", "diagonal", "dense")
HEAD_DIMS = (8, 16, 24, 32, 64, 64, 80, 96, 128, 256)


def random_lengths(rng: random.Random, *, max_sequences: int = 4, max_chunks: int = 10) -> list[list[int]]:
    """Return the chunk lengths of a few sequences, some without chunks."""
    return [
        [rng.choice(CHUNK_LENGTHS) for _ in range(rng.randint(0, max_chunks))]
        for _ in range(rng.randint(1, max_sequences))
    ]


def random_mask(rng: random.Random, kind: str, lengths: list[list[int]]) -> rk.ChunkMask:
    chunks = sum(map(len, lengths))
    if kind == "full":
        return rk.ChunkMask.full()
    if kind == "diagonal":
        return rk.ChunkMask.diagonal()
    if kind == "passages":
        return rk.ChunkMask.passages(torch.tensor([rng.randint(-1, 3) for _ in range(chunks)], dtype=torch.int64))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return rk.ChunkMask.from_dense([torch.rand(len(s), len(s), generator=generator) < rng.random() for s in lengths])


@dataclasses.dataclass
class PlanProblem:
    """Arguments of plan_attention, and the pairs that they allow according to the specification."""

    layout: rk.ChunkLayout
    mask: rk.ChunkMask
    causal: bool
    window: int | tuple[int, int] | None
    kv_layout: rk.ChunkLayout | None

    @property
    def keys(self) -> rk.ChunkLayout:
        return self.layout if self.kv_layout is None else self.kv_layout

    def plan(self, **kwargs) -> rk.AttentionPlan:
        return rk.plan_attention(
            self.layout, self.mask, causal=self.causal, window=self.window, kv_layout=self.kv_layout, **kwargs
        )

    def allowed(self) -> torch.Tensor:
        return allowed_pairs(self.layout, self.mask, causal=self.causal, window=self.window, kv_layout=self.kv_layout)


def random_plan_problem(rng: random.Random, **limits) -> PlanProblem:
    lengths = random_lengths(rng, **limits)
    keys = rk.ChunkLayout.from_lengths(lengths)
    layout, kv_layout = keys, None
    if rng.random() < 0.3:  # the query rows are the last rows of each sequence
        rows = [rng.randint(0, sum(sequence)) for sequence in lengths]
        layout, kv_layout = rk.ChunkLayout.from_lengths([[n] if n else [] for n in rows]), keys
    causal = rng.random() < 0.6
    windows = [None, None, (rng.randint(-1, 40), rng.randint(-1, 40)), *([rng.randint(1, 50)] if causal else [])]
    return PlanProblem(layout, random_mask(rng, rng.choice(MASKS), lengths), causal, rng.choice(windows), kv_layout)


@dataclasses.dataclass
class AttentionProblem:
    """Inputs of mixed_attention and of its backward pass, in one dtype."""

    plan_problem: PlanProblem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    grad_lse: torch.Tensor
    options: dict

    def run(self, backend: str | None = None, **plan_options) -> dict[str, torch.Tensor]:
        """Return output, lse and all gradients."""
        leaves = {name: getattr(self, name).detach().requires_grad_() for name in "qkv"}
        options = dict(self.options)
        if options["sinks"] is not None:
            leaves["sinks"] = options["sinks"] = options["sinks"].detach().clone().requires_grad_()
        out, lse = rk.mixed_attention(
            *(leaves[name] for name in "qkv"),
            self.plan_problem.plan(**plan_options),
            return_lse=True,
            backend=backend,
            **options,
        )
        grads = self._gradients(out, lse, leaves)
        return {"out": out.detach(), "lse": lse.detach()} | grads

    def expected(self) -> dict[str, torch.Tensor]:
        """Return the same in float64, from dense scores and torch's own autograd."""
        leaves = {name: getattr(self, name).detach().double().requires_grad_() for name in "qkv"}
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scale = self.options["scale"] or q.shape[-1] ** -0.5
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        if self.options["softcap"]:
            scores = self.options["softcap"] * torch.tanh(scores / self.options["softcap"])
        scores = scores.masked_fill(~self.plan_problem.allowed(), float("-inf"))
        if self.options["sinks"] is not None:
            leaves["sinks"] = self.options["sinks"].detach().double().requires_grad_()
            sinks = leaves["sinks"][:, None, None].expand(-1, q.shape[0], 1)
        else:
            sinks = scores.new_full((q.shape[1], q.shape[0], 1), float("-inf"))
        scores = torch.cat([scores, sinks], 2)
        empty = scores.isneginf().all(2, keepdim=True)
        # Fully masked rows have defined results; replace their scores so that no NaN enters the gradients.
        scores = torch.where(empty, 0.0, scores)
        p = torch.where(empty, 0.0, scores.softmax(2))[:, :, :-1]
        lse = torch.where(empty[..., 0], float("-inf"), scores.logsumexp(2)).T
        out = torch.einsum("hij,jhd->ihd", p, v)
        return {"out": out.detach(), "lse": lse.detach()} | self._gradients(out, lse, leaves)

    def _gradients(self, out, lse, leaves):
        # The lse of a fully masked row is -inf, and its gradient is undefined.
        grad_lse = torch.where(lse.isneginf(), 0, self.grad_lse.to(lse.dtype))
        grads = torch.autograd.grad([out, lse], list(leaves.values()), [self.grad_out.to(out.dtype), grad_lse])
        return {f"d{name}": grad for name, grad in zip(leaves, grads)}

    def upstream(self) -> torch.Tensor:
        return self.grad_out


def random_attention_problem(
    seed: int, dtype: torch.dtype, *, plain: bool = False, head_dims: Sequence[int] = HEAD_DIMS, **limits
) -> AttentionProblem:
    """Return a random problem; ``plain`` uses only features of torch's SDPA."""
    rng = random.Random(seed)
    plan_problem = random_plan_problem(rng, **limits)
    kv_heads, group = rng.choice([(1, 1), (2, 1), (1, 3), (3, 3), (2, 4), (1, 8)])
    head_dim = rng.choice(head_dims)
    generator = torch.Generator().manual_seed(seed)
    # Slices of a larger tensor: half of the problems have non-contiguous strides.
    pad = rng.choice([0, 0, 8])

    def rows(count: int, heads: int) -> torch.Tensor:
        storage = torch.randn(count, heads + (pad > 0), head_dim + pad, generator=generator)
        return storage.to(dtype)[:, :heads, :head_dim]

    heads = kv_heads * group
    tokens, keys = plan_problem.layout.total_rows, plan_problem.keys.total_rows
    sinks = torch.randn(heads, generator=generator) if not plain and rng.random() < 0.3 else None
    if sinks is not None and dtype == torch.float64:
        sinks = sinks.double()
    options = {
        "scale": None if plain or rng.random() < 0.7 else rng.uniform(0.05, 0.3),
        "softcap": None if plain or rng.random() < 0.7 else rng.uniform(2.0, 30.0),
        "sinks": sinks,
    }
    return AttentionProblem(
        plan_problem,
        rows(tokens, heads),
        rows(keys, kv_heads),
        rows(keys, kv_heads),
        rows(tokens, heads),
        torch.randn(tokens, heads, generator=generator),
        options,
    )
