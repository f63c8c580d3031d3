"""Random paged problems and their dense float64 solutions, for all tests of the paged family."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import os
import random

import torch

from tests.support.accuracy import DTYPES as LOW_DTYPES
from tests.support.accuracy import LSE, relative_error

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float64, *LOW_DTYPES)

# Only the C++ kernels reject float64 among the CPU backends.
COMBINATIONS = [(b, d) for b in BACKENDS for d in DTYPES if not (b == "cpu" and d == torch.float64)]


def name_of(value) -> str | None:
    """Return a dtype's name for a test id."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def assert_rows_close(got: torch.Tensor, expected: torch.Tensor, bounds: dict[torch.dtype, float], what: str) -> None:
    """Compare the whole, and each row with a looser bound, so that a single bad row can't hide in the norm."""
    bound = bounds[got.dtype if bounds is not LSE else torch.float64 if got.dtype == torch.float64 else torch.float32]
    error = relative_error(got, expected)
    assert error <= bound, f"{what}: error {error:.2e} over {bound:.0e}"
    # A row with few heads may have an lse near 0 or a cancelling sum, so its scale has an absolute floor.
    for row in range(len(got)):
        error = relative_error(got[row], expected[row], upstream=torch.full((10,), 10.0))
        assert error <= 8 * bound, f"{what}, row {row}: error {error:.2e} over {8 * bound:.0e}"


def at_the_edge(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that is followed directly by unreadable memory."""
    size = tensor.numel() * tensor.element_size()
    readable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + readable), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0, os.strerror(
        ctypes.get_errno()
    )
    if size == 0:
        return tensor.clone()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=readable - size)
    return copy.view(tensor.shape).copy_(tensor)


@dataclasses.dataclass
class Problem:
    """The arguments of a paged_attention call, and its solution."""

    args: tuple[torch.Tensor, ...]  # q, k_pages, v_pages, page_table, kv_lengths
    options: dict
    out: torch.Tensor
    lse: torch.Tensor


def random_cache(
    generator: torch.Generator,
    lengths: list[int],
    *,
    kv_heads: int,
    dim: int,
    page: int,
    dtype: torch.dtype,
    wide: bool = False,
    amplitude: float = 1.0,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each sequence's keys and values, and the pages and the page table that hold them.

    Pages are in random order, with unused pages in between. Unused rows are NaN, and page ids beyond a sequence's
    length refer to pages that must not be read. If ``wide``, the pages are views with an offset into a buffer that is
    larger in each dimension, with heads before rows.
    """
    used = [math.ceil(length / page) for length in lengths]
    num_pages = sum(used) + 2
    max_pages = max([*used, 0]) + 1
    order = torch.randperm(num_pages, generator=generator)
    table = torch.tensor([-1, -(2**31), num_pages, 2**31 - 1], dtype=torch.int32)[
        torch.randint(4, (len(lengths), max_pages), generator=generator)
    ]
    if wide:
        buffer = torch.full((num_pages, 2, kv_heads + 1, page + 3, dim + 8), torch.nan, dtype=dtype)
        k_pages, v_pages = (buffer[:, i, 1:, 2:-1, 8:].transpose(1, 2) for i in range(2))
        table = torch.cat([table, table], 1)[:, : table.shape[1]]
    else:
        k_pages, v_pages = (torch.full((num_pages, page, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    keys, values, taken = [], [], 0
    for b, length in enumerate(lengths):
        k = (amplitude * torch.randn(length, kv_heads, dim, generator=generator, dtype=torch.float64)).to(dtype)
        v = torch.randn(length, kv_heads, dim, generator=generator, dtype=torch.float64).to(dtype)
        for slot in range(used[b]):
            table[b, slot] = order[taken]
            rows = slice(slot * page, min((slot + 1) * page, length))
            k_pages[order[taken], : rows.stop - rows.start] = k[rows]
            v_pages[order[taken], : rows.stop - rows.start] = v[rows]
            taken += 1
        keys.append(k)
        values.append(v)
    return keys, values, k_pages, v_pages, table


def random_ranges(rng: random.Random, end: int) -> list[tuple[int, int]]:
    """Return sorted, disjoint ranges below ``end`` or a little beyond it; some are empty, some touch."""
    cuts = sorted(rng.randint(0, end + 3) for _ in range(2 * rng.randint(0, 4)))
    return list(zip(cuts[::2], cuts[1::2], strict=True))


def make_problem(
    seed: int,
    lengths: list[int],
    rows: list[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    page: int = 4,
    dtype: torch.dtype = torch.float32,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: bool = False,
    visible: bool = False,
    wide: bool = False,
    amplitude: float = 1.0,
) -> Problem:
    """Make a problem: sequence b has ``lengths[b]`` keys and ``rows[b]`` query rows (one if ``rows`` is None)."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    q_heads, kv_heads = heads
    keys, values, k_pages, v_pages, table = random_cache(
        generator, lengths, kv_heads=kv_heads, dim=dim, page=page, dtype=dtype, wide=wide, amplitude=amplitude
    )
    counts = [1] * len(lengths) if rows is None else rows
    offsets = [sum(counts[:b]) for b in range(len(counts) + 1)]
    q = torch.randn(offsets[-1], q_heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    options: dict = {"window": window, "softcap": softcap, "scale": scale}
    if wide:
        q = torch.cat([q, q], 1).transpose(0, 1).contiguous().transpose(0, 1)[:, :q_heads]
    if rows is not None:
        options["q_offsets"] = torch.tensor(offsets, dtype=torch.int32)
    if sinks:
        options["sinks"] = torch.randn(q_heads, generator=generator)
    ranges = None
    if visible:
        ranges = [random_ranges(rng, lengths[b]) for b, count in enumerate(counts) for _ in range(count)]
        starts = [sum(len(r) for r in ranges[:t]) for t in range(len(ranges) + 1)]
        # An extra range that belongs to no row, as in buffers of a fixed capacity.
        flat = [pair for r in ranges for pair in r] + [(0, 2**31 - 1)]
        options["visible"] = (torch.tensor(starts, dtype=torch.int32), torch.tensor(flat, dtype=torch.int32))
    out, lse = [torch.empty(0, q_heads, dim)], [torch.empty(0, q_heads)]
    for b, count in enumerate(counts):
        mask = visible_keys(lengths[b], count, window, ranges and ranges[offsets[b] : offsets[b + 1]])
        solution = dense_attention(
            q[offsets[b] : offsets[b + 1]], keys[b], values[b], mask, options.get("sinks"), scale, softcap
        )
        out.append(solution[0])
        lse.append(solution[1])
    args = (q, k_pages, v_pages, table, torch.tensor(lengths, dtype=torch.int32))
    return Problem(args, options, torch.cat(out), torch.cat(lse))


def visible_keys(
    length: int, count: int, window: int | tuple[int, int] | None, ranges: list[list[tuple[int, int]]] | None
) -> torch.Tensor:
    """Return the keys that each of a sequence's last rows attends to, as the documentation defines them."""
    mask = torch.zeros(count, length, dtype=torch.bool)
    j = torch.arange(length)
    for row in range(count):
        i = length - count + row
        mask[row] = j <= i
        if isinstance(window, int):
            mask[row] &= j > i - window
        elif window is not None:
            mask[row] &= (window[0] == -1 or j >= i - window[0]) & (window[1] == -1 or j <= i + window[1])
        if ranges is not None:
            mask[row] &= sum(((start <= j) & (j < end) for start, end in ranges[row]), torch.zeros(length)) > 0
    return mask


def dense_attention(q, k, v, mask, sinks=None, scale=None, softcap=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in float64 with all heads repeated and a dense mask [rows, keys]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # [H, keys, D]
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    terms = torch.where(mask, scores.exp(), 0.0)  # [H, rows, keys]; test scores are far from overflow
    total = terms.sum(-1)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None]
    out = (terms @ v) / total.clamp_min(torch.finfo(torch.float64).tiny)[..., None]
    return out.transpose(0, 1), total.log().transpose(0, 1)
