"""mixed_attention's CUDA kernel, run thread by thread on the CPU, against float64."""

import dataclasses
import itertools
import random

import pytest
import torch
import torch.nn.functional as F

import refrag_kernels as rk
from refrag_kernels.grid_order import TILES_FIRST, Order
from tests.cuda_host import host_library
from tests.support.accuracy import LSE, OUTPUT, relative_error
from tests.support.factory import AttentionProblem, PlanProblem, random_mask, random_plan_problem
from tests.support.nonfinite import spoilt_problem

pytestmark = pytest.mark.device_code

# head_dim, and tiles per stage: fewer than 4 on multiprocessors with only 100 KB of shared memory.
VARIANTS = [
    (torch.bfloat16, 64, 4),
    (torch.float16, 64, 4),
    (torch.bfloat16, 96, 3),
    (torch.float16, 96, 4),
    (torch.bfloat16, 128, 4),
    (torch.float16, 128, 2),
]
HEADS = [
    (1, 1),
    (2, 1),
    (1, 2),
    (2, 3),
    (1, 4),
    (1, 7),
    (1, 8),
    (1, 12),
]  # key/value heads, query heads per key/value head


def make_problem(seed, plan_problem, dtype, head_dim, heads, *, softcap=None, sinks=False) -> AttentionProblem:
    generator = torch.Generator().manual_seed(seed)
    kv_heads, q_heads = heads[0], heads[0] * heads[1]
    pad = 8 * (seed % 2)  # every other problem has padded strides

    def rows(count: int, heads: int) -> torch.Tensor:
        storage = torch.randn(count, heads + (pad > 0), head_dim + pad, generator=generator).to(dtype)
        return storage[:, :heads, :head_dim]

    tokens, keys = plan_problem.layout.total_rows, plan_problem.keys.total_rows
    q, k, v = rows(tokens, q_heads), rows(keys, kv_heads), rows(keys, kv_heads)
    options = {"scale": None, "softcap": softcap, "sinks": torch.randn(q_heads, generator=generator) if sinks else None}
    return AttentionProblem(plan_problem, q, k, v, torch.zeros(q.shape), torch.zeros(tokens, q_heads), options)


def run(problem: AttentionProblem, tiles: int, plan: rk.AttentionPlan | None = None, of=TILES_FIRST, **options):
    """Return out and lse of the kernel, whose CTAs run in the order ``of``."""
    library = host_library.load("attention")
    plan = problem.plan_problem.plan() if plan is None else plan
    q, k, v = problem.q, problem.k, problem.v
    out = host_library.guarded(torch.full(q.shape, torch.nan, dtype=q.dtype))
    lse = host_library.guarded(torch.full(q.shape[:2], torch.nan))
    lists = [
        plan.sizes, plan.q_blocks, plan.full_offsets, plan.full_ranges, plan.partial_offsets, plan.partial_keys,
        plan.partial_bits,
    ]  # fmt: skip
    head_dim, softcap = q.shape[2], problem.options["softcap"] or 0.0
    with host_library.options(library, **options):
        host_library.call(
            library,
            "mixed_attention",
            q.dtype,
            head_dim,
            tiles,
            host_library.pointers(q, k, v, out, lse, problem.options["sinks"], *lists),
            host_library.int64s([stride for tensor in (q, k, v) for stride in tensor.stride()[:2]]),
            host_library.ints([len(q), len(k), len(plan.q_blocks), q.shape[1], k.shape[1], *of]),
            float(problem.options["scale"] or head_dim**-0.5),
            float(softcap),
        )
    host_library.check_guard(out)
    host_library.check_guard(lse)
    return out, lse


def check(problem: AttentionProblem, out: torch.Tensor, lse: torch.Tensor) -> None:
    expected = problem.expected()
    assert relative_error(out, expected["out"]) <= OUTPUT[out.dtype]
    assert relative_error(lse, expected["lse"]) <= LSE[out.dtype]


@pytest.mark.parametrize("seed", range(48 if host_library.ALL else 12))
def test_where_nan_goes(seed):
    """The equivalent of tests/kernels/test_nonfinite.py for the other backends."""
    rng = random.Random(seed)
    dtype, head_dim, tiles = VARIANTS[seed % len(VARIANTS)]
    plan_problem = random_plan_problem(rng, max_sequences=3, max_chunks=6)
    problem = make_problem(seed, plan_problem, dtype, head_dim, HEADS[seed // 3 % len(HEADS)], sinks=rng.random() < 0.4)
    spoilt = spoilt_problem(seed, dtype, problem)
    out, lse = run(spoilt.spoilt, tiles, order=rng.choice(host_library.ORDERS), seed=seed)
    spoilt.check({"out": out, "lse": lse})


@pytest.mark.parametrize("seed", range(192 if host_library.ALL else 24))
def test_random_problems(seed):
    rng = random.Random(seed)
    dtype, head_dim, tiles = VARIANTS[seed % len(VARIANTS)]
    plan_problem = random_plan_problem(rng, max_sequences=3, max_chunks=6)
    softcap = rng.uniform(2.0, 30.0) if rng.random() < 0.3 else None
    problem = make_problem(
        seed, plan_problem, dtype, head_dim, HEADS[seed // 3 % len(HEADS)], softcap=softcap, sinks=rng.random() < 0.4
    )
    order, early_copies = rng.choice(host_library.ORDERS), rng.random() < 0.5
    of = Order(rng.randint(0, problem.k.shape[1]), rng.choice([0, 5, 264]))
    out, lse = run(problem, tiles, of=of, order=order, seed=seed, early_copies=early_copies)
    check(problem, out, lse)


@pytest.mark.parametrize(("kilobytes", "expected"), [(164, (4, 4, 4)), (100, (4, 3, 2)), (228, (4, 4, 4))])
def test_the_tiles_that_a_device_gets(kilobytes, expected):
    library = host_library.load("attention")
    assert tuple(library.attention_tiles(head_dim, kilobytes << 10, 1 << 10) for head_dim in (64, 96, 128)) == expected


@pytest.mark.parametrize("lengths", [[[150]], [[16]], [[1]], [[64, 64]], [[3, 90], [], [40, 40]]], ids=str)
def test_plain_causal(lengths):
    problem = make_problem(
        1, PlanProblem(rk.ChunkLayout.from_lengths(lengths), rk.ChunkMask.full(), True, None, None),
        torch.bfloat16, 64, (1, 2),
    )  # fmt: skip
    check(problem, *run(problem, 4))


def test_every_order_of_threads_gives_the_same_bits():
    plan_problem = random_plan_problem(random.Random(5), max_sequences=2, max_chunks=6)
    problem = make_problem(3, plan_problem, torch.float16, 64, (1, 3))
    results = [
        run(problem, 4, order=order, seed=seed, early_copies=early)
        for order, seed, early in [
            ("forward", 0, False),
            ("reversed", 0, True),
            ("shuffled", 1, False),
            ("shuffled", 2, True),
        ]
    ]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("heads", [(5, 1), (3, 5), (2, 12)])
def test_every_order_of_blocks_gives_the_same_bits(heads):
    """Sections that do and don't divide the heads, several head groups per key/value head, rows beyond the batch."""
    lengths = [[30, 1, 1, 16], [7, 20]]
    layout = rk.ChunkLayout.from_lengths(lengths)
    plan_problem = PlanProblem(layout, random_mask(random.Random(1), "passages", lengths), True, None, None)
    problem = make_problem(4, plan_problem, torch.float16, 64, heads)
    plan = plan_problem.plan(capacity=rk.PlanCapacity.for_rows(128, sequences=4))
    missing = 128 - layout.total_rows
    padded = dataclasses.replace(
        problem, **{name: F.pad(getattr(problem, name), (0, 0, 0, 0, 0, missing), value=torch.nan) for name in "qkv"}
    )
    expected = run(padded, 4, plan)
    check(problem, *(result[: layout.total_rows] for result in expected))
    assert (expected[0][layout.total_rows :] == 0).all() and expected[1][layout.total_rows :].isneginf().all()
    for section, ahead in itertools.product(range(1, heads[0] + 1), (0, 1, 2 * heads[0], 264)):
        out, lse = run(padded, 4, plan, of=Order(section, ahead))
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]), (section, ahead)


def test_the_places_of_blocks():
    """Each place occurs once, as in refrag_kernels/grid_order.py; without sections it equals the grid's."""
    library = host_library.load("attention")
    for blocks, heads, groups, section, ahead in itertools.product((1, 5), (1, 3, 4), (1, 3), (0, 1, 2, 4), (0, 7, 99)):
        columns, width = heads * groups, max(1, min(section, heads) * groups)
        leading = min(blocks, -(-ahead // columns))
        expected = [(x, y) for x in range(leading) for y in range(columns)]
        for first in range(0, columns, width):
            of_section = range(first, min(first + width, columns))
            expected += [(x, y) for x in range(leading, blocks) for y in of_section]
        found = host_library.ints([-1] * 2 * len(expected))
        # A head group has at most eight query heads.
        sizes = host_library.ints([blocks, heads, groups * 8, min(section, heads), ahead])
        host_library.call(library, "places", sizes, found)
        assert list(zip(found[::2], found[1::2])) == expected, (blocks, heads, groups, section, ahead)
        if (section, ahead) == (0, 0):
            assert expected == [(x, y) for y in range(columns) for x in range(blocks)]


def test_fully_masked_rows():
    lengths = [[20, 5, 17]]
    mask = rk.ChunkMask.from_dense(torch.tensor([[True, False, False], [False] * 3, [False, False, True]]))
    plan_problem = PlanProblem(rk.ChunkLayout.from_lengths(lengths), mask, False, None, None)
    out, lse = run(make_problem(2, plan_problem, torch.bfloat16, 64, (1, 4)), 4)
    assert (out[20:25] == 0).all() and lse[20:25].isneginf().all() and lse[:20].isfinite().all()
    problem = make_problem(2, plan_problem, torch.bfloat16, 64, (1, 4), sinks=True)
    out, lse = run(problem, 4)
    assert (out[20:25] == 0).all() and torch.allclose(lse[20:25], problem.options["sinks"].expand(5, 4))
    check(problem, out, lse)


def test_a_sink_far_above_every_score():
    problem = make_problem(
        1, PlanProblem(rk.ChunkLayout.from_lengths([[30]]), rk.ChunkMask.full(), True, None, None),
        torch.bfloat16, 64, (1, 2), sinks=True,
    )  # fmt: skip
    problem.options["sinks"] = torch.tensor([300.0, -300.0])
    out, lse = run(problem, 4)
    assert (out[:, 0] == 0).all() and (lse[:, 0] == 300).all()
    expected = problem.expected()
    assert relative_error(out[:, 1], expected["out"][:, 1]) <= OUTPUT[out.dtype]


@pytest.mark.parametrize("sinks", [False, True])
def test_capacity(sinks):
    """Rows beyond the batch may hold any values; their results are those of fully masked rows."""
    lengths, rng = [[30, 1, 1, 16], [7, 20]], random.Random(0)
    layout = rk.ChunkLayout.from_lengths(lengths)
    exact = make_problem(
        4, PlanProblem(layout, random_mask(rng, "passages", lengths), True, None, None), torch.bfloat16, 64, (1, 4),
        sinks=sinks,
    )  # fmt: skip
    rows = layout.total_rows
    plan = exact.plan_problem.plan(capacity=rk.PlanCapacity.for_rows(128, sequences=4))
    padded = dataclasses.replace(
        exact,
        **{name: torch.cat([getattr(exact, name), torch.full_like(getattr(exact, name), torch.nan)[: 128 - rows],
                            torch.full_like(getattr(exact, name), torch.nan)])[:128] for name in "qkv"},
    )  # fmt: skip
    out, lse = run(padded, 4, plan)
    expected = exact.expected()
    assert relative_error(out[:rows], expected["out"]) <= OUTPUT[out.dtype]
    assert relative_error(lse[:rows], expected["lse"]) <= LSE[out.dtype]
    assert (out[rows:] == 0).all()
    assert torch.equal(
        lse[rows:], exact.options["sinks"].expand(128 - rows, 4) if sinks else torch.full((128 - rows, 4), -torch.inf)
    )


def test_scores_that_overflow_without_a_maximum():
    problem = make_problem(
        2, PlanProblem(rk.ChunkLayout.from_lengths([[70]]), rk.ChunkMask.full(), True, None, None),
        torch.bfloat16, 64, (1, 1),
    )  # fmt: skip
    problem.q *= 60
    problem.k *= 60
    out, lse = run(problem, 4)
    check(problem, out, lse)
