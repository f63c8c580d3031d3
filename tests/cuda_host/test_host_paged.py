"""The paged family's CUDA kernels, run thread by thread on the CPU, against float64."""

import random

import pytest
import torch

import refrag_kernels as rk
from tests.cuda_host import host_library
from tests.support.accuracy import DTYPES, LSE, OUTPUT, relative_error
from tests.support.nonfinite import spoilt_paged
from tests.support.paged_problems import Problem, make_problem

pytestmark = pytest.mark.device_code

# head_dim, and warps per CTA: 2 on multiprocessors with only 100 KB of shared memory.
VARIANTS = [
    (torch.bfloat16, 64, 4),
    (torch.float16, 64, 4),
    (torch.bfloat16, 96, 2),
    (torch.float16, 96, 4),
    (torch.bfloat16, 128, 4),
    (torch.float16, 128, 2),
]
HEADS = [(1, 1), (4, 2), (3, 1), (8, 1), (8, 2), (16, 1), (20, 1)]


def run(problem: Problem, *, warps: int = 4, splits: int = 0, **schedule):
    q, k_pages, v_pages, table, lengths = problem.args
    options = problem.options
    indptr, ranges = options.get("visible", (None, None))
    window = options["window"]
    left = -1 if window is None else window - 1 if isinstance(window, int) else window[0]
    library = host_library.load("paged")
    out = host_library.guarded(torch.full(q.shape, torch.nan, dtype=q.dtype))
    lse = host_library.guarded(torch.full(q.shape[:2], torch.nan))
    pointers = (q, k_pages, v_pages, table, lengths, options.get("q_offsets"), indptr, ranges, options.get("sinks"))
    strides = [*q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], table.stride(0)]
    num_ranges = 0 if ranges is None else len(ranges)
    counts = [*q.shape[:2], len(lengths), *k_pages.shape[:2], table.shape[1], num_ranges, k_pages.shape[2]]
    with host_library.options(library, **schedule):
        host_library.call(
            library,
            "paged_attention",
            q.dtype,
            q.shape[2],
            warps,
            host_library.pointers(*pointers, out, lse),
            host_library.int64s(strides),
            host_library.ints(counts),
            float(options["scale"] or q.shape[2] ** -0.5),
            float(options["softcap"] or 0.0),
            left,
            splits,
        )
    host_library.check_guard(out)
    host_library.check_guard(lse)
    return out, lse


def check(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    assert relative_error(out, problem.out) <= OUTPUT[out.dtype]
    assert relative_error(lse, problem.lse) <= LSE[out.dtype]


@pytest.mark.parametrize("seed", range(168 if host_library.ALL else 24))
def test_random_problems(seed):
    rng = random.Random(seed)
    dtype, head_dim, warps = VARIANTS[seed % len(VARIANTS)]
    lengths = [rng.choice([0, 1, 5, 16, 63, 64, 65, 130, 200]) for _ in range(rng.randint(1, 4))]
    rows = None if seed % 3 == 0 else [rng.randint(0, min(length, 9)) for length in lengths]
    problem = make_problem(
        seed,
        lengths,
        rows,
        heads=HEADS[seed % len(HEADS)],
        dim=head_dim,
        page=rng.choice([1, 3, 16, 64]),
        dtype=dtype,
        window=rng.choice([None, None, 20, (70, -1)]),
        softcap=rng.choice([None, None, 8.0]),
        scale=rng.choice([None, 0.2]),
        sinks=rng.random() < 0.4,
        visible=rng.random() < 0.4,
        wide=rng.random() < 0.5,
    )
    splits = rng.choice([0, 2, 3])
    order = rng.choice(host_library.ORDERS)
    check(problem, *run(problem, warps=warps, splits=splits, order=order, seed=seed, early_copies=rng.random() < 0.5))


@pytest.mark.parametrize("seed", range(48 if host_library.ALL else 12))
def test_where_nan_goes(seed):
    """The equivalent of tests/kernels/test_nonfinite.py for the other backends."""
    dtype, head_dim, warps = VARIANTS[seed % len(VARIANTS)]
    spoilt = spoilt_paged(seed, dtype, dim=head_dim, heads=HEADS[seed % len(HEADS)])
    spoilt.check(*run(spoilt.problem, warps=warps, splits=seed % 3, seed=seed))


@pytest.mark.parametrize("splits", [0, 2])
def test_a_key_of_nan_is_not_a_key_that_is_not_seen(splits):
    problem = make_problem(1, [1], heads=(2, 1), dim=64, page=16, dtype=torch.bfloat16)
    problem.args[1].fill_(torch.nan)
    out, lse = run(problem, splits=splits)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize(("kilobytes", "expected"), [(164, (4, 4, 4)), (100, (4, 2, 2)), (228, (4, 4, 4))])
def test_the_warps_that_a_device_gets(kilobytes, expected):
    library = host_library.load("paged")
    assert tuple(library.paged_warps(head_dim, kilobytes << 10, 1 << 10) for head_dim in (64, 96, 128)) == expected


def test_a_chunked_prefill():
    problem = make_problem(7, [150, 40], [70, 40], heads=(4, 2), dim=64, page=16, dtype=torch.bfloat16)
    check(problem, *run(problem))


def test_every_order_of_threads_gives_the_same_bits():
    problem = make_problem(3, [150, 64], heads=(4, 1), dim=64, page=16, dtype=torch.float16, sinks=True)
    first = run(problem, splits=2)
    for order, seed, early in [("reversed", 0, True), ("shuffled", 1, False), ("shuffled", 2, True)]:
        again = run(problem, splits=2, order=order, seed=seed, early_copies=early)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_rows_of_no_sequence_and_pages_that_do_not_exist():
    """With a fixed capacity, rows after the last sequence are fully masked. Invalid pages are masked."""
    problem = make_problem(1, [20, 33], [2, 3], heads=(2, 1), dim=64, page=16, dtype=torch.bfloat16)
    q, *cache = problem.args
    problem.args = (torch.cat([q, torch.full((4, 2, 64), torch.nan, dtype=q.dtype)]), *cache)
    out, lse = run(problem)
    assert relative_error(out[:5], problem.out) <= OUTPUT[out.dtype]
    assert (out[5:] == 0).all() and lse[5:].isneginf().all()
    cache[2][1, :3] = 10**6
    out, lse = run(problem)
    assert (out[2:] == 0).all() and lse[2:].isneginf().all() and lse[:2].isfinite().all()


@pytest.mark.parametrize(("piece", "head_dim"), [(16, 64), (2, 72)])
def test_append_kv(piece, head_dim):
    generator = torch.Generator().manual_seed(0)
    lengths, rows, page, heads = [20, 0, 33, 7], [3, 0, 20, 7], 8, 3
    k, v = torch.randn(2, sum(rows), heads, head_dim, generator=generator).half()
    table = torch.randperm(30, generator=generator)[:24].view(4, 6).int()
    offsets = torch.tensor([0, 3, 3, 23, 30], dtype=torch.int32)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    k_pages, v_pages = (host_library.guarded(torch.zeros(30, page, heads, head_dim).half()) for _ in range(2))
    expected_k, expected_v = k_pages.clone(), v_pages.clone()
    rk.append_kv(k, v, expected_k, expected_v, table, lengths, offsets, backend="reference")
    strides = [*k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3]]
    host_library.call(
        host_library.load("paged"),
        "append_kv",
        piece,
        host_library.pointers(k, v, k_pages, v_pages, table, lengths, offsets),
        host_library.int64s([*(2 * stride for stride in strides), table.stride(0), 2 * head_dim]),
        host_library.ints([len(k), len(lengths), 30, page, 6, heads]),
    )
    assert torch.equal(k_pages, expected_k) and torch.equal(v_pages, expected_v)
    for pages in (k_pages, v_pages):
        host_library.check_guard(pages)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_states(dtype):
    generator = torch.Generator().manual_seed(0)
    out_a, out_b = torch.randn(2, 11, 3, 72, generator=generator).to(dtype)
    lse_a, lse_b = 20 * torch.randn(2, 11, 3, generator=generator)
    lse_a[:4], lse_b[2:6] = -torch.inf, -torch.inf
    out_a[:4], out_b[2:6] = torch.nan, torch.nan
    out = host_library.guarded(torch.full_like(out_a, torch.nan))
    lse = host_library.guarded(torch.full_like(lse_a, torch.nan))
    host_library.call(
        host_library.load("paged"), "merge_states", dtype, out_a, lse_a, out_b, lse_b, out, lse, 33, 72
    )  # fmt: skip
    expected = rk.merge_states(out_a.double(), lse_a.double(), out_b.double(), lse_b.double(), backend="reference")
    assert relative_error(out, expected[0]) <= OUTPUT[dtype]
    assert relative_error(lse, expected[1]) <= LSE[dtype]
    for tensor in (out, lse):
        host_library.check_guard(tensor)
