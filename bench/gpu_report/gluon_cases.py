"""Problems and configurations for checking and timing the Gluon kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import refrag_kernels as rk
from bench.cases.prompts import Passages
from refrag_kernels.triton_kernels import attention_hopper
from refrag_kernels.triton_kernels.attention_hopper import Config

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Configurations for grouped query heads, and for one query head per key/value head. Those with masks are for plans
# with partial tiles.
CONFIGS = {
    4: {
        "128 keys x 2": Config(),
        "64 keys x 4": Config(block_n=64, num_stages=4),
        "128 keys x 2, in turn": Config(in_turn=True),
        "64 keys x 4, in turn": Config(block_n=64, num_stages=4, in_turn=True),
        "128 keys x 2, 240 registers": Config(consumer_registers=240, producer_registers=24),
        "128 keys x 2, 4 heads a tile": Config(blocks=2),
        "masks, 128 keys x 2": Config(masks=True),
        "masks, 64 keys x 4": Config(block_n=64, num_stages=4, masks=True),
    },
    1: {
        "64 keys x 2, two blocks": Config(block_n=64, warpgroups=1),
        "128 keys x 2, tiles of 128 rows": Config(blocks=8),
        "64 keys x 4, tiles of 128 rows": Config(block_n=64, num_stages=4, blocks=8),
        "masks, 128 keys x 2, tiles of 128 rows": Config(blocks=8, masks=True),
    },
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A mask and heads: full attention, passages with the given ``density``, or causal attention."""

    name: str
    rows: int
    heads: tuple[int, int]
    density: float = 1.0
    by_heads: bool = False  # whether q, k and v are stored as [H, T, D]
    causal: bool = False

    @property
    def group(self) -> int:
        return self.heads[0] // self.heads[1]

    @property
    def dense(self) -> bool:
        return self.density == 1.0

    def allowed(self, device: str) -> torch.Tensor | None:
        """Return the allowed row pairs, or None for all."""
        if self.causal:
            return torch.ones(self.rows, self.rows, dtype=torch.bool, device=device).tril()
        return None if self.dense else Passages(self.rows, 16, self.density).dense().to(device)

    def pairs(self) -> int:
        if self.causal:
            return self.rows * (self.rows + 1) // 2
        return self.rows**2 if self.dense else int(Passages(self.rows, 16, self.density).dense().sum())

    def plan(self, device: str) -> rk.AttentionPlan:
        if self.dense:
            layout = rk.ChunkLayout.from_lengths([[self.rows]])
            return rk.plan_attention(layout, causal=self.causal, device=device)
        return Passages(self.rows, 16, self.density).plan(device)

    def tensors(self, device: str) -> Tensors:
        generator = torch.Generator(device).manual_seed(0)

        def made(heads: int) -> torch.Tensor:
            shape = (heads, self.rows, 128) if self.by_heads else (self.rows, heads, 128)
            tensor = torch.randn(shape, generator=generator, device=device).bfloat16()
            return tensor.transpose(0, 1) if self.by_heads else tensor

        return made(self.heads[0]), made(self.heads[1]), made(self.heads[1])


# Each configuration on a small problem. Passages of 512 rows have ranges of an odd number of 64-key tiles, and several.
CHECKS = {
    "128 keys x 2": Problem("passages of 512 rows", 512, (8, 2), 0.4219),
    "64 keys x 4": Problem("passages of 512 rows, by heads", 512, (8, 2), 0.4219, by_heads=True),
    "128 keys x 2, 4 heads a tile": Problem("passages of 1,024 rows, by heads", 1024, (16, 4), 0.2305, by_heads=True),
    "128 keys x 2, in turn": Problem("320 rows", 320, (16, 4)),
    "64 keys x 4, in turn": Problem("passages of 1,024 rows", 1024, (8, 2), 0.2305),
    "128 keys x 2, 240 registers": Problem("1,024 rows", 1024, (32, 8)),
    "64 keys x 2, two blocks": Problem("passages of 1,024 rows", 1024, (8, 8), 0.2305),
    "128 keys x 2, tiles of 128 rows": Problem("640 rows, by heads", 640, (4, 4), by_heads=True),
    "64 keys x 4, tiles of 128 rows": Problem("384 rows", 384, (16, 16)),
    "masks, 128 keys x 2": Problem("causal, 999 rows", 999, (8, 2), causal=True),
    "masks, 64 keys x 4": Problem("causal, 376 rows", 376, (8, 2), causal=True),
    "masks, 128 keys x 2, tiles of 128 rows": Problem("passages of 1,024 rows", 1024, (8, 8), 0.2305),
}
TIMED = (
    Problem("passages, 12 % of 4,096", 4096, (32, 8), 0.12),
    Problem("full, 4,096", 4096, (32, 8)),
    Problem("passages, 12 % of 4,096", 4096, (32, 32), 0.12),
    Problem("causal, 4,096", 4096, (32, 8), causal=True),
    Problem("full, 4,096", 4096, (32, 32)),
    Problem("full, 16,384", 16384, (32, 8)),
    Problem("full, 1,024", 1024, (32, 8)),
    Problem("full, 1,024", 1024, (32, 32)),
    Problem("causal, 376", 376, (32, 8), causal=True),
    Problem("full, 16,384", 16384, (32, 32)),
)
# For a dry run with the emulator.
TINY = Problem("passages of 256 rows", 256, (4, 1), 0.6875)


def config_named(name: str) -> Config:
    return next(configs[name] for configs in CONFIGS.values() if name in configs)


def runner(problem: Problem, config: Config, plan: rk.AttentionPlan, tensors: Tensors) -> Callable[[], tuple]:
    """Return a call of the kernel that gives output and lse. Raises ValueError if the plan doesn't fit ``config``."""
    q, k, v = tensors
    if q.device.type == "cpu":
        return _emulated(problem, config, plan, tensors)
    work = attention_hopper.divide(plan, *problem.heads, config=config)
    if config.masks and not work.partial_tiles.shape[0]:
        raise ValueError("plan: got one without partial tiles, which another configuration takes")
    return lambda: attention_hopper.hopper_attention(q, k, v, work, q.shape[2] ** -0.5)


def _emulated(problem: Problem, config: Config, plan: rk.AttentionPlan, tensors: Tensors) -> Callable[[], tuple]:
    from bench.static.gluon_on_cpu import Emulator

    work = attention_hopper.divide(plan, *problem.heads, programs=2, config=config)
    out, lse = torch.empty(tensors[0].shape, dtype=tensors[0].dtype), torch.empty(tensors[0].shape[:2])
    kernel, arguments, _ = attention_hopper.launch_arguments(*tensors, out, lse, work, tensors[0].shape[2] ** -0.5)
    emulator = Emulator(Path(attention_hopper.__file__).with_name("attention_hopper_kernels.py"))

    def call() -> tuple:
        emulator.launch(kernel.__name__, work.starts.shape[0] - 1, 0, arguments)
        return out, lse

    return call


def expected(problem: Problem, tensors: Tensors, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float64 output and lse of the given query heads."""
    q, k, v = tensors
    allowed = problem.allowed(str(q.device))
    outs, lses = [], []
    for head in heads:
        keys, values = (tensor[:, head // problem.group].double() for tensor in (k, v))
        scores = q[:, head].double() @ keys.T * q.shape[2] ** -0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        outs.append(scores.softmax(1) @ values)
        lses.append(scores.logsumexp(1))
    return torch.stack(outs, 1), torch.stack(lses, 1)
