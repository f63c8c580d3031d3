"""Launch configurations: a table by kernel, architecture and element size.

Attention's of sm_90 at 16 bits, heads of 64 and 128, were the fastest of several on an H100; the others have not been
measured. All fit in the shared memory of the architecture, and compile without spills but in float32 and at 256;
tests/triton checks both. Nothing is tuned when it runs: a call is the same on every machine.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How a kernel is compiled for an architecture."""

    block_m: int  # rows that a CTA keeps: of queries, or of keys for their gradients
    block_n: int  # rows of the other side per iteration
    num_warps: int
    num_stages: int


# By head dimension, up to which the entry holds. Longer steps and larger tiles than these spill on sm_80 and sm_120,
# where the operands of matrix instructions come from registers.
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
}
# float32 is split in two for its three passes of TF32: wider heads leave room for fewer rows.
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
}
# By architecture and element size, where another choice is better than the tables above.
_ATTENTION_OTHER: dict[tuple[str, int], dict[str, dict[int, Config]]] = {
    # A second stage spills, but for one head a key.
    ("sm_80", 2): {"dkv": {64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1)}},
    # 99 KiB of shared memory hold 16 rows of head_dim 256 beside a tile of keys.
    ("sm_86", 2): {
        "dq": {128: Config(block_m=64, block_n=32, num_warps=8, num_stages=2)},
        "dkv": {
            64: Config(block_m=64, block_n=32, num_warps=4, num_stages=1),
            256: Config(block_m=64, block_n=16, num_warps=8, num_stages=1),
        },
    },
    # Measured on an H100: two blocks of four warps on a multiprocessor, with the rows of a matrix instruction each, are
    # up to twice as fast as blocks of eight warps.
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
    # Matrix instructions of sm_100 read shared memory: registers are left for longer steps.
    ("sm_100", 2): {
        "forward": {128: Config(block_m=128, block_n=64, num_warps=8, num_stages=2)},
        "dq": {
            64: Config(block_m=128, block_n=32, num_warps=8, num_stages=1),
            128: Config(block_m=64, block_n=32, num_warps=4, num_stages=2),
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
    # A wave has 512 registers if the block has 4; shared memory is 64 KiB.
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


# The same where scores have a softcap, whose slope and tanh take registers too.
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
}


def attention(kernel: str, architecture: str, head_dim: int, element_size: int, softcap: bool = False) -> Config:
    """Return the configuration of an attention kernel for heads of ``head_dim`` elements, a power of 2 up to 256."""
    bucket = max(64, head_dim)
    tables = [_ATTENTION_16_BIT if element_size == 2 else _ATTENTION_32_BIT]
    tables += [_ATTENTION_OTHER.get((architecture, element_size), {})]
    tables += [_ATTENTION_SOFTCAP.get((architecture, element_size), {})] if softcap else []
    return next(found[bucket] for found in (table.get(kernel, {}) for table in reversed(tables)) if bucket in found)


def short_kv(heads: int, architecture: str, head_dim: int, element_size: int, softcap: bool = False) -> Config:
    """Return the configuration of tiles of one block, for up to so many heads, with short KV: 16 keys at a time.

    A warp takes the 16 rows of a head, of up to 128 bytes each; rows of more bytes are shared by more warps, for their
    registers.
    """
    row = head_dim * element_size  # bytes
    # What the rows take of shared memory: float32 is split in two for its three passes of TF32.
    rows = min(16 * heads, (32 if element_size == 2 else 16) * 1024 // row)
    share = max(1, row // 128)
    if architecture == "sm_90" and rows >= 64:
        # A warpgroup takes 64 rows. Two of them for these, with 8 keys each, read beyond shared memory in float32 as
        # Triton 3.6 compiles it: seen on an H100.
        share = 1
    if softcap and row == 128 and architecture in ("sm_80", "sm_86", "sm_100"):
        share = 2  # ptxas leaves itself 128 registers for one warp, and spills
    if architecture == "sm_120" and row == 256:
        rows = min(rows, 32)  # of more rows four warps spill, and eight, which get 128 registers each of ptxas
    return Config(block_m=rows, block_n=16, num_warps=min(8, rows // 16 * share), num_stages=1)


class LinearConfig(NamedTuple):
    """How a product of matrices is compiled for an architecture."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By the number of rows, up to which the entry holds. Up to 64 rows the weights are all that is read: narrow tiles make
# enough programs to read them with the whole device.
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
    # Measured on an H100: 64 programs of 128 by 128 leave half of it idle.
    ("sm_90", 2): {
        16: LinearConfig(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4),
        63: LinearConfig(block_m=32, block_n=32, block_k=128, num_warps=4, num_stages=4),
        400: LinearConfig(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3),
        0: LinearConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    },
}


def linear(architecture: str, rows: int, element_size: int) -> LinearConfig:
    """Return the configuration of a product with so many rows."""
    table = _LINEAR_16_BIT if element_size == 2 else _LINEAR_32_BIT
    table = _LINEAR_OTHER.get((architecture, element_size), table)
    return next(config for limit, config in table.items() if rows <= limit or not limit)


# Decoding reads each key once: a long step with many loads under way is all that counts.
_PAGED = {
    # (element size, decode): by head dimension
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
# By architecture, where another choice is better: a third stage leaves 99 KiB of shared memory one block at a time;
# four warps with ranges spill on sm_120.
_PAGED_OTHER = {
    ("sm_86", 2, True): {128: Config(block_m=16, block_n=64, num_warps=4, num_stages=2)},
    ("sm_120", 2, True): {128: Config(block_m=16, block_n=64, num_warps=4, num_stages=2)},
    ("sm_120", 2, False): {128: Config(block_m=64, block_n=32, num_warps=8, num_stages=2)},
}


def paged(architecture: str, head_dim: int, element_size: int, decode: bool, many: bool = False) -> Config:
    """Return the configuration of paged_attention; ``decode``: one row a sequence.

    ``many``: whether programs fill the device several times over. Then the rate of memory binds and not what a program
    waits for before its first keys: on an H200 a third buffer takes 0.76 times as long for 32 sequences of 65,536 keys,
    and for one of 4,096 keys 1.11 times, or 0.95 times where its table is wide.
    """
    bucket = max(64, head_dim)
    other = _PAGED_OTHER.get((architecture, element_size, decode), {})
    config = other.get(bucket, _PAGED[element_size, decode][bucket])
    if many and decode and architecture == "sm_90" and element_size == 2 and bucket <= 128:
        config = config._replace(num_stages=config.num_stages + 1)
    # 64 KiB of shared memory: AMD pipelines through registers.
    return config._replace(num_stages=1) if architecture == "gfx942" else config
