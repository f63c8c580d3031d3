"""Sweep variants of paged decoding by batch, length and table width, compared with torch on contiguous keys."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.engine.case import bound_of
from bench.engine.timing import Times, interleave
from bench.gpu_report.block import Options, Results, run
from bench.gpu_report.contest import contest
from refrag_kernels.triton_kernels import decode, paged
from refrag_kernels.triton_kernels.decode import Decode

_PAGE = 16
_WIDE = 131072  # keys that a wide table can hold
_LEAST = 4.0  # approximate seconds per case, including compilation

# The first is the previous version; the default's num_stages are those of configs.paged.
_WAYS = {
    "pages in step, parts of the table": Decode(ahead=False, by_length=False, num_stages=3),
    "default": Decode(),
    "pages ahead, parts of the length, stages 3": Decode(num_stages=3),
    "pages ahead, parts of the length, stages 4": Decode(num_stages=4),
    "pages ahead, parts of the length, stages 5": Decode(num_stages=5),
    "pages in step, parts of the length, stages 3": Decode(ahead=False, num_stages=3),
    "pages in step, parts of the length, stages 5": Decode(ahead=False, num_stages=5),
    "pages in step, parts of the length, stages 7": Decode(ahead=False, num_stages=7),
    "pages ahead, parts of the table, stages 3": Decode(by_length=False, num_stages=3),
    # As many buffers as num_stages=3 has, for comparison.
    "pages in step, parts of the length, stages 4": Decode(ahead=False, num_stages=4),
}
_FEW = dict(list(_WAYS.items())[:3])


@dataclasses.dataclass(frozen=True)
class _Shape:
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    keys: int
    table: int  # keys that the table can hold

    @property
    def case(self) -> str:
        table = "" if self.table == self.keys else f", table for {self.table}"
        return f"{self.batch} x {self.keys} keys{table}, {self.heads}/{self.kv_heads} heads"

    @property
    def bytes(self) -> float:
        return 4.0 * self.batch * self.keys * self.kv_heads * self.head_dim


def block(options: Options, results: Results) -> None:
    """Time the variants at each shape, those with the largest expected gain first."""
    if options.dry_run:
        for batch, table in ((1, 70), (2, 300)):
            _case(_Shape(4, 2, 16, batch, 70, table), _FEW, 1.0, options, results)
        return
    rate = _copy(results)
    grouped = [_Shape(32, 8, 128, *sizes) for sizes in itertools.product((1, 32), (4096, 65536), (0, _WIDE))]
    grouped = [dataclasses.replace(shape, table=shape.table or shape.keys) for shape in grouped]
    # Short KV and batch size 1 first, where latency matters most in a decode step.
    grouped.sort(key=lambda shape: shape.bytes)
    own = _Shape(32, 32, 128, 1, 4096, 4096)
    for shape in (*grouped[:2], own, *grouped[2:]):
        if options.seconds_left > _LEAST:
            _case(shape, _FEW if shape is own else _WAYS, rate, options, results)


def _copy(results: Results) -> float:
    """Measure the memory copy bandwidth, in bytes read and written per second."""
    source = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, 7, device="cuda")["copy"]
    rate = 2 * source.nbytes / times.median
    results.add("copy", median_s=times.median, p20_s=times.quantile(0.2), p80_s=times.quantile(0.8), bytes_per_s=rate)
    return rate


def _case(shape: _Shape, ways: dict[str, Decode], rate: float, options: Options, results: Results) -> None:
    device = torch.device(options.device)
    # The interpreter doesn't support bfloat16.
    dtype = torch.float16 if options.dry_run else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    blocks = -(-shape.keys // _PAGE)
    pages = shape.batch * blocks
    k_pages, v_pages = (random(pages, _PAGE, shape.kv_heads, shape.head_dim) for _ in range(2))
    q = random(shape.batch, shape.heads, shape.head_dim)
    used = torch.randperm(pages, generator=generator, device=device).view(shape.batch, blocks)
    table = torch.full((shape.batch, -(-shape.table // _PAGE)), -1, dtype=torch.int32, device=device)
    table[:, :blocks] = used
    lengths = torch.full((shape.batch,), shape.keys, dtype=torch.int32, device=device)
    k, v = (p[used].flatten(1, 2)[:, : shape.keys].transpose(1, 2).contiguous() for p in (k_pages, v_pages))
    scale = shape.head_dim**-0.5

    def torchs() -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def by(way: Decode) -> Callable[[], torch.Tensor]:
        def ours() -> torch.Tensor:
            with decode.use(way):
                return paged.paged_attention(
                    q, k_pages, v_pages, table, lengths, None, None, None, scale, 0.0, -1, -1, None
                )[0]  # fmt: skip

        return ours

    def values(times: Times) -> dict[str, float]:
        speed = shape.bytes / times.median
        return {"gb_per_s": speed * 1e-9, "share_of_copy": speed / rate}

    some = [0, -1]  # sequences to check: all of them in float64 would not fit
    expected = F.scaled_dot_product_attention(
        q[some][:, :, None].double(), k[some].double(), v[some].double(), enable_gqa=True
    )[:, :, 0]
    contest(
        shape.case, {**{name: by(way) for name, way in ways.items()}, "SDPA, contiguous keys": torchs}, expected,
        bound_of(dtype), options, results, rounds=15, view=lambda out: out[some], values=values,
        said={name: way._asdict() for name, way in ways.items()},
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run("decode_sweep", block))
