"""Launch configurations: a table by kernel, architecture and element size.

The attention configurations of sm_90 at 16 bits with head_dim 64 and 128 were the fastest of several on an H100; the
others have not been measured. All fit in the shared memory of the architecture, and compile without spills except in
float32 and at head_dim 256; tests/triton checks both. There is no autotuning: a call is the same on every machine.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Compile-time configuration of a kernel."""

    block_m: int  # rows of a CTA's tile: of queries, or of keys for dk and dv
    block_n: int  # rows of the other side per iteration
    num_warps: int
    num_stages: int


# By the largest head_dim of each entry. Larger block_m or block_n spill on sm_80 and sm_120, where the operands of
# matrix instructions come from registers.
_ATTENTION_16_BIT = {
    "forward": {
        64: Config(block_m=128, block_n=64, num_warps=8, num_stages=3),
        128: Config(block_m=64, block_n=64, num_warps=8, num_stages=2),
        256: Config(block_m=64, block_n=32, num_warps=8, num_stages=1),
    },
    "dq": {
        64: Config(block_m=128, block_n=32, num_warps=8, num_stages=2),
        128: Config(block_m=128, block_n=32, num_warps=8, num_stages=2),
        256: Config(block_m=64, block_n=32, num_warps=8, num_stages=1),
    },
    "dkv": {
        64: Config(block_m=64, block_n=32, num_warps=4, num_stages=2),
        128: Config(block_m=64, block_n=32, num_warps=8, num_stages=2),
        256: Config(block_m=64, block_n=32, num_warps=8, num_stages=1),
    },
    "received": {
        64: Config(block_m=64, block_n=64, num_warps=4, num_stages=3),
        128: Config(block_m=64, block_n=64, num_warps=4, num_stages=2),
        256: Config(block_m=64, block_n=32, num_warps=4, num_stages=2),
    },
}
# float32 is split in two for its three TF32 passes: a larger head_dim leaves room for fewer rows.
_ATTENTION_32_BIT = {
    "forward": {
        64: Config(block_m=64, block_n=32, num_warps=4, num_stages=2),
        128: Config(block_m=32, block_n=32, num_warps=8, num_stages=1),
        256: Config(block_m=16, block_n=32, num_warps=8, num_stages=1),
    },
    "dq": {
        64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        128: Config(block_m=32, block_n=32, num_warps=8, num_stages=1),
        256: Config(block_m=16, block_n=32, num_warps=8, num_stages=1),
    },
    "dkv": {
        64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        128: Config(block_m=32, block_n=32, num_warps=8, num_stages=1),
        256: Config(block_m=16, block_n=16, num_warps=8, num_stages=1),
    },
    "received": {
        64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        128: Config(block_m=32, block_n=32, num_warps=4, num_stages=1),
        256: Config(block_m=16, block_n=32, num_warps=4, num_stages=1),
    },
}
# By architecture and element size: overrides of the tables above.
_ATTENTION_OTHER: dict[tuple[str, int], dict[str, dict[int, Config]]] = {
    # A third stage of the forward kernel and a second one of the others spill.
    ("sm_80", 2): {
        "forward": {64: Config(block_m=128, block_n=64, num_warps=8, num_stages=2)},
        "dq": {64: Config(block_m=128, block_n=32, num_warps=8, num_stages=1)},
        "dkv": {64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1)},
    },
    # 99 KiB of shared memory hold 16 rows of head_dim 256 beside a tile of keys. With 32 keys at a time of head_dim 128
    # ptxas leaves itself 128 registers, and spills.
    ("sm_86", 2): {
        "dq": {
            64: Config(block_m=128, block_n=32, num_warps=8, num_stages=1),
            128: Config(block_m=64, block_n=64, num_warps=8, num_stages=2),
        },
        "dkv": {
            64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=16, num_warps=8, num_stages=1),
        },
    },
    # Measured on an H100: two resident CTAs of four warps, each with the 64 rows of a wgmma, are up to twice as fast as
    # CTAs of eight warps.
    ("sm_90", 2): {
        "forward": {
            64: Config(block_m=64, block_n=64, num_warps=4, num_stages=3),
            128: Config(block_m=64, block_n=64, num_warps=4, num_stages=3),
        },
        "dq": {
            64: Config(block_m=64, block_n=64, num_warps=4, num_stages=3),
            128: Config(block_m=64, block_n=64, num_warps=4, num_stages=2),
        },
        "dkv": {
            64: Config(block_m=64, block_n=64, num_warps=4, num_stages=1),
            128: Config(block_m=64, block_n=32, num_warps=4, num_stages=3),
        },
    },
    # Matrix instructions of sm_100 read shared memory, which leaves registers for larger tiles.
    ("sm_100", 2): {
        "forward": {128: Config(block_m=128, block_n=64, num_warps=8, num_stages=2)},
        "dq": {
            64: Config(block_m=128, block_n=32, num_warps=8, num_stages=1),
            128: Config(block_m=64, block_n=32, num_warps=8, num_stages=2),
        },
        # With 32 keys at a time ptxas leaves itself 80 or 96 registers, and spills.
        "dkv": {64: Config(block_m=64, block_n=64, num_warps=4, num_stages=2)},
    },
    ("sm_120", 2): {
        "forward": {128: Config(block_m=128, block_n=32, num_warps=8, num_stages=2)},
        "dq": {128: Config(block_m=64, block_n=32, num_warps=8, num_stages=1)},
        "dkv": {
            64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=16, num_warps=8, num_stages=1),
        },
    },
    # A wave has 512 registers if its workgroup has 4 waves; shared memory is 64 KiB.
    ("gfx942", 2): {
        "forward": {
            64: Config(block_m=128, block_n=64, num_warps=4, num_stages=2),
            128: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        },
        "dq": {
            64: Config(block_m=64, block_n=32, num_warps=4, num_stages=2),
            128: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        },
        "dkv": {
            64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            128: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        },
    },
    ("gfx942", 4): {
        "forward": {
            128: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        },
        "dq": {
            128: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        },
        "dkv": {
            128: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
        },
    },
}


# Overrides with a softcap, whose tanh and derivative take registers too.
_ATTENTION_SOFTCAP: dict[tuple[str, int], dict[str, dict[int, Config]]] = {
    ("sm_80", 2): {
        "forward": {64: Config(block_m=128, block_n=32, num_warps=8, num_stages=3)},
        "dq": {128: Config(block_m=64, block_n=32, num_warps=8, num_stages=2)},
    },
    ("sm_86", 2): {
        "forward": {64: Config(block_m=128, block_n=32, num_warps=8, num_stages=3)},
        "dq": {128: Config(block_m=64, block_n=32, num_warps=8, num_stages=2)},
    },
    ("sm_90", 2): {"dq": {128: Config(block_m=64, block_n=32, num_warps=4, num_stages=3)}},
    ("sm_100", 2): {"received": {256: Config(block_m=64, block_n=32, num_warps=4, num_stages=1)}},
}


def attention(kernel: str, architecture: str, head_dim: int, element_size: int, softcap: bool = False) -> Config:
    """Return the configuration of an attention kernel for ``head_dim``, a power of 2 up to 256."""
    bucket = max(64, head_dim)
    tables = [_ATTENTION_16_BIT if element_size == 2 else _ATTENTION_32_BIT]
    tables += [_ATTENTION_OTHER.get((architecture, element_size), {})]
    tables += [_ATTENTION_SOFTCAP.get((architecture, element_size), {})] if softcap else []
    return next(found[bucket] for found in (table.get(kernel, {}) for table in reversed(tables)) if bucket in found)


def short_kv(heads: int, architecture: str, head_dim: int, element_size: int, softcap: bool = False) -> Config:
    """Return the configuration for short KV: tiles of one block and up to ``heads`` heads, 16 keys per iteration.

    One warp processes the 16 rows of a head if rows have up to 128 bytes; longer rows are distributed over more warps,
    as they need more registers.
    """
    row = head_dim * element_size  # bytes
    # Limited by shared memory: float32 is split in two for its three TF32 passes.
    rows = min(16 * heads, (32 if element_size == 2 else 16) * 1024 // row)
    share = max(1, row // 128)
    if architecture == "sm_90" and rows >= 64:
        # One warpgroup per 64 rows. With two of them, 8 keys each, float32 code of Triton 3.6 reads out of bounds in
        # shared memory: observed on an H100.
        share = 1
    if softcap and row == 128 and architecture in ("sm_80", "sm_86", "sm_100"):
        share = 2  # ptxas limits one warp to 128 registers, and spills
    if architecture == "sm_120" and row == 256:
        rows = min(rows, 32)  # with more rows four warps spill, as do eight, which ptxas limits to 128 registers
    # With one stage ptxas limits two warps to 128 registers, and spills.
    stages = 2 if architecture == "sm_90" and row == 256 and rows * share == 32 else 1
    return Config(block_m=rows, block_n=16, num_warps=min(8, rows // 16 * share), num_stages=stages)


class LinearConfig(NamedTuple):
    """Compile-time configuration of a matrix product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By the largest number of rows of each entry (0: any). Up to 64 rows the time is that of reading the weights: narrow
# tiles make enough programs to use the bandwidth of the whole device.
_LINEAR_16_BIT = {
    16: LinearConfig(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4),
    63: LinearConfig(block_m=32, block_n=32, block_k=128, num_warps=4, num_stages=4),
    255: LinearConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
    0: LinearConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
}
_LINEAR_32_BIT = {
    16: LinearConfig(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=3),
    63: LinearConfig(block_m=32, block_n=32, block_k=64, num_warps=4, num_stages=3),
    0: LinearConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
}
_LINEAR_OTHER: dict[tuple[str, int], dict[int, LinearConfig]] = {
    # Measured on an H100: 64 programs of 128 x 128 tiles leave half of it idle.
    ("sm_90", 2): {
        16: LinearConfig(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4),
        63: LinearConfig(block_m=32, block_n=32, block_k=128, num_warps=4, num_stages=4),
        400: LinearConfig(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3),
        0: LinearConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    },
}


def linear(architecture: str, rows: int, element_size: int) -> LinearConfig:
    """Return the configuration of a matrix product with ``rows`` rows."""
    table = _LINEAR_16_BIT if element_size == 2 else _LINEAR_32_BIT
    table = _LINEAR_OTHER.get((architecture, element_size), table)
    return next(config for limit, config in table.items() if rows <= limit or not limit)


# Decoding reads each key once, so what counts is the bytes in flight: a large block_n and several stages.
_PAGED = {
    # (element size, decode): by head_dim
    (2, True): {
        64: Config(block_m=16, block_n=64, num_warps=4, num_stages=3),
        128: Config(block_m=16, block_n=64, num_warps=4, num_stages=3),
        256: Config(block_m=16, block_n=64, num_warps=4, num_stages=2),
    },
    (2, False): {
        64: Config(block_m=64, block_n=64, num_warps=4, num_stages=2),
        128: Config(block_m=64, block_n=32, num_warps=4, num_stages=2),
        256: Config(block_m=32, block_n=32, num_warps=8, num_stages=1),
    },
    (4, True): {
        64: Config(block_m=16, block_n=32, num_warps=4, num_stages=2),
        128: Config(block_m=16, block_n=32, num_warps=4, num_stages=2),
        256: Config(block_m=16, block_n=32, num_warps=4, num_stages=1),
    },
    (4, False): {
        64: Config(block_m=32, block_n=32, num_warps=4, num_stages=2),
        128: Config(block_m=32, block_n=32, num_warps=8, num_stages=1),
        256: Config(block_m=16, block_n=32, num_warps=8, num_stages=1),
    },
}
# Overrides by architecture: with a third stage only one CTA fits in 99 KiB of shared memory; four warps with visible
# ranges spill on sm_120.
_PAGED_OTHER = {
    ("sm_86", 2, True): {128: Config(block_m=16, block_n=64, num_warps=4, num_stages=2)},
    ("sm_120", 2, True): {128: Config(block_m=16, block_n=64, num_warps=4, num_stages=2)},
    ("sm_120", 2, False): {128: Config(block_m=64, block_n=32, num_warps=8, num_stages=2)},
}


def paged(architecture: str, head_dim: int, element_size: int, decode: bool, many: bool = False) -> Config:
    """Return the configuration of paged_attention; ``decode``: one row per sequence.

    ``many``: whether programs fill the device several times over, so that the kernel is bound by memory bandwidth
    rather than by the latency before a program's first keys. On an H200 one more stage takes 0.76 times as long for 32
    sequences of 65,536 keys; for one sequence of 4,096 keys 1.11 times, or 0.95 times if its page table is wide.
    """
    bucket = max(64, head_dim)
    other = _PAGED_OTHER.get((architecture, element_size, decode), {})
    config = other.get(bucket, _PAGED[element_size, decode][bucket])
    if many and decode and architecture == "sm_90" and element_size == 2 and bucket <= 128:
        config = config._replace(num_stages=config.num_stages + 1)
    # With 64 KiB of shared memory, AMD pipelines through registers.
    return config._replace(num_stages=1) if architecture == "gfx942" else config
