"""Model the minimum time of kernels on GPUs: ``python -m bench.roofline``. Nothing here is a measurement.

The lower bound is the larger of the time of a kernel's matrix products at the published matrix rate and the time of its
memory traffic at the published bandwidth, with each tensor read or written once. Real kernels take longer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import refrag_kernels as rk
from bench.cases.presets import PRESETS, Preset
from bench.cases.prompts import Passages, Prompt

_BYTES = 2  # per bfloat16 element


class Gpu(NamedTuple):
    """Published rates: dense bfloat16 FLOP/s, and memory bandwidth in bytes/s."""

    flops: float
    bandwidth: float


GPUS = {
    # NVIDIA A100 80GB SXM datasheet: 312 TFLOPS, 2,039 GB/s.
    "A100": Gpu(312e12, 2039e9),
    # NVIDIA H100 SXM datasheet: 1,979 TFLOPS with sparsity, half of that without; 3.35 TB/s.
    "H100": Gpu(989.5e12, 3.35e12),
    # NVIDIA H200 SXM datasheet: the same FLOPS; 4.8 TB/s.
    "H200": Gpu(989.5e12, 4.8e12),
    # NVIDIA HGX B200 datasheet, 8 GPUs: 36 PFLOPS with sparsity; 62 TB/s (8 x 7.7).
    "B200": Gpu(2250e12, 7.7e12),
    # AMD Instinct MI300X datasheet: 1,307.4 TFLOPS, 5.3 TB/s.
    "MI300X": Gpu(1307.4e12, 5.3e12),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a kernel: FLOPs of its matrix products, and bytes of memory traffic."""

    name: str
    flops: float
    bytes: float

    def floor(self, gpu: Gpu) -> float:
        """Return the minimum time on a GPU, in seconds."""
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth)

    def bound(self, gpu: Gpu) -> str:
        """Return which rate determines the minimum time."""
        return "products" if self.flops / gpu.flops >= self.bytes / gpu.bandwidth else "memory"


def attention(name: str, plan: rk.AttentionPlan, shape: Preset) -> Work:
    """Return the work of ``mixed_attention``'s forward pass: two dot products per row pair in the plan's tiles."""
    stats, (rows, keys) = plan.stats(), plan.sizes[:2].tolist()
    numbers = 2 * rows * shape.heads * shape.head_dim + 2 * keys * shape.kv_heads * shape.head_dim
    traffic = _BYTES * numbers + 4 * rows * shape.heads + sum(t.nbytes for t in plan.tensors())
    return Work(name, 4.0 * stats["pairs_computed"] * shape.heads * shape.head_dim, float(traffic))


def decoding(context: int, shape: Preset) -> Work:
    """Return the work of ``paged_attention`` for one row, which reads each key and value once."""
    keys = 2 * context * shape.kv_heads * shape.head_dim
    rows = 2 * shape.heads * shape.head_dim
    return Work(
        f"decode, {context:,} keys", 4.0 * context * shape.heads * shape.head_dim, float(_BYTES * (keys + rows))
    )


def assembly(prompt: Prompt, shape: Preset) -> Work:
    """Return the work of ``embed_mixed``: two layers for each compressed chunk, and the copy of all rows.

    The hidden layer does not fit in a multiprocessor, so it is written to memory and read back.
    """
    layout = prompt.layout()
    chunks = prompt.chunks - sum(prompt.expanded())
    text = layout.total_rows - chunks  # rows read from the token table
    weights = shape.hidden_size * (shape.encoder_hidden_size + shape.hidden_size + 2)
    rows = chunks * shape.encoder_hidden_size + (2 * chunks + text + layout.total_rows) * shape.hidden_size
    traffic = _BYTES * (weights + rows) + 12 * layout.total_rows  # an int64 token and an int32 slot per row
    flops = 2.0 * chunks * shape.hidden_size * (shape.encoder_hidden_size + shape.hidden_size)
    return Work(f"embed_mixed, {chunks:,} chunks", flops, float(traffic))


def works(preset: str, contexts: Sequence[int], ks: Sequence[int]) -> Iterator[Work]:
    """Yield the work of the kernels of one layer and of the input, for a model's prompts."""
    shape = PRESETS[preset]
    for context in contexts:
        full = rk.plan_attention(rk.ChunkLayout.from_lengths([[context]]))
        yield attention(f"attention, full text, {context:,} rows", full, shape)
        for k in ks:
            prompt = Prompt(context, k, 0.0)
            layout = prompt.layout()
            name = f"attention, k = {k}, {layout.total_rows:,} rows"
            yield attention(name, rk.plan_attention(layout), shape)
            yield dataclasses.replace(work := assembly(prompt, shape), name=f"{work.name}, k = {k}")
        passages = Passages(context, 16, 0.12)
        yield attention(f"attention, passages, {context:,} rows, density 12 %", passages.plan(), shape)
        yield decoding(context, shape)


def table(preset: str, contexts: Sequence[int], ks: Sequence[int]) -> list[str]:
    """Return the minimum times of a model's kernels as the lines of a Markdown table."""
    lines = [
        f"| {preset}, bfloat16 | GFLOP | MB | " + " | ".join(f"{name}, us" for name in GPUS) + " |",
        "| --- " * (3 + len(GPUS)) + "|",
    ]
    for work in works(preset, contexts, ks):
        floors = " | ".join(f"{1e6 * work.floor(gpu):.1f} ({work.bound(gpu)})" for gpu in GPUS.values())
        lines.append(f"| {work.name} | {work.flops / 1e9:.2f} | {work.bytes / 1e6:.1f} | {floors} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the minimum times."""
    parser = argparse.ArgumentParser("python -m bench.roofline", description=__doc__)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=["llama2-7b", "llama2-13b", "llama3-8b"])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--k", nargs="+", type=int, default=[8, 16, 32])
    options = parser.parse_args(arguments)
    for name in ("context", "k"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name}: got {min(getattr(options, name))}, needs 1 or more")
    print("One call of a layer's kernel: a model from published rates, not a measurement.\n")
    for preset in options.preset:
        print("\n".join(table(preset, options.context, options.k)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
