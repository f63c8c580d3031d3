"""The Hopper kernel's source on the CPU: against float64, with random orders of events, and with injected faults."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch

import refrag_kernels as rk
from bench.cases.prompts import Passages
from bench.static import gluon_on_cpu
from refrag_kernels.reference.mask import allowed_pairs
from tests.support.accuracy import LSE, OUTPUT, relative_error
from tests.support.factory import random_plan_problem

pytestmark = pytest.mark.cpp

hopper = pytest.importorskip("refrag_kernels.triton_kernels.attention_hopper", exc_type=ImportError)
Config = hopper.Config

SOURCE = Path(hopper.__file__).with_name("attention_hopper_kernels.py")
SCALE = 128**-0.5


@dataclasses.dataclass
class Problem:
    plan: rk.AttentionPlan
    allowed: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    config: Config
    programs: int
    shuffled: bool = False  # whether a program processes its items in random order

    def run(self, seed=0, edits=()):
        """Return output and lse computed by the kernel's source."""
        work = hopper.divide(self.plan, self.q.shape[1], self.k.shape[1], programs=self.programs, config=self.config)
        if self.shuffled:
            for items in work.items.tensor_split(work.starts[1:-1].tolist()):
                items.copy_(items[torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))])
        out, lse = torch.empty(self.q.shape, dtype=self.q.dtype), torch.empty(self.q.shape[:2])
        _, arguments, _ = hopper.launch_arguments(self.q, self.k, self.v, out, lse, work, SCALE)
        emulator = gluon_on_cpu.Emulator(SOURCE, edits)
        emulator.launch("mixed_attention_fwd_hopper_kernel", work.starts.shape[0] - 1, seed, arguments)
        return out, lse

    def expected(self):
        """Return output and lse of the float64 reference."""
        inputs = (tensor.double() for tensor in (self.q, self.k, self.v))
        return rk.mixed_attention(*inputs, self.plan, scale=SCALE, return_lse=True, backend="reference")

    def check(self, out, lse):
        want_out, want_lse = self.expected()
        assert relative_error(out, want_out) <= OUTPUT[torch.bfloat16]
        assert relative_error(lse, want_lse) <= LSE[torch.bfloat16]


DEFAULT = Config()


def problem(
    seed, config=DEFAULT, kv_heads=1, group=2, programs=3, lengths=None, seen=0.6, query_rows=None, strided=False
):
    """Return a problem of chunks that are multiples of 64 rows long and attend to each other at random.

    ``seen``: the probability of that, or a matrix.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = lengths or [[64 * rng.randint(1, 2) for _ in range(rng.randint(1, 3))] for _ in range(2)]
    keys = rk.ChunkLayout.from_lengths(lengths)
    if isinstance(seen, float):
        seen = [torch.rand(len(s), len(s), generator=generator) < seen for s in lengths]
    mask = rk.ChunkMask.from_dense(seen)
    layout = keys if query_rows is None else rk.ChunkLayout.from_lengths([[rows] for rows in query_rows])
    options = dict(causal=False, kv_layout=None if query_rows is None else keys)

    def rows(count, heads):
        more = 8 if strided else 0
        tensor = torch.randn(heads + (more > 0), count + 1, 128 + more, generator=generator).bfloat16()
        tensor = tensor.transpose(0, 1) if strided else tensor.transpose(0, 1).contiguous()
        return tensor[:count, :heads, :128]  # strided: by heads, as a model's projections may be

    q = rows(layout.total_rows, kv_heads * group)
    k, v = (rows(keys.total_rows, kv_heads) for _ in range(2))
    plan, allowed = rk.plan_attention(layout, mask, **options), allowed_pairs(layout, mask, **options)
    return Problem(plan, allowed, q, k, v, config, programs)


CASES = {
    "step of 128": problem(0),
    "one program": problem(1, programs=1),
    "more programs than items": problem(2, programs=50),
    "step of 64, 4 stages": problem(3, Config(block_n=64, num_stages=4), group=4),
    "step of 64, 3 stages, 4 heads of 2 blocks": problem(
        4, Config(block_n=64, num_stages=3, blocks=2), group=8, programs=5
    ),
    "step of 128, 3 stages, key/value heads": problem(5, Config(num_stages=3), kv_heads=2, strided=True),
    "in turn": problem(13, Config(in_turn=True), lengths=[[256, 64], [128]], programs=2),
    "in turn, step of 64": problem(
        14, Config(block_n=64, num_stages=3, in_turn=True), lengths=[[256, 64], [128]], programs=2
    ),
    "one warpgroup, one head": problem(6, Config(block_n=64, warpgroups=1), kv_heads=2, group=1),
    "one warpgroup, two heads": problem(7, Config(warpgroups=1, blocks=2)),
    "eight blocks, one head": problem(8, Config(blocks=8), kv_heads=2, group=1, lengths=[[128, 256]], strided=True),
    "fully masked rows": problem(9, seen=0.2, lengths=[[64] * 5]),
    "all rows fully masked": problem(10, seen=0.0, lengths=[[64, 64]]),
    "blocks of fewer rows": problem(11, seen=1.0, lengths=[[64, 128], [64], [192]], query_rows=[57, 49, 70]),
    "long": problem(12, Config(block_n=64, num_stages=2), lengths=[[576, 64]], seen=1.0, programs=2),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    case = CASES[name]
    out, lse = case.run(seed=1)
    case.check(out, lse)


@pytest.mark.parametrize("step", [64, 128])
def test_results_do_not_depend_on_the_order_of_events(step):
    case = problem(20, Config(block_n=step, num_stages=2), kv_heads=1, lengths=[[128, 64, 192]])
    want = case.run(seed=0)
    case.check(*want)
    for seed, (programs, stages) in enumerate(itertools.product((2, 3), (2, 4)), 1):
        case.programs, case.config = programs, case.config._replace(num_stages=stages)
        for got, wanted in zip(case.run(seed), want):
            assert torch.equal(got, wanted), f"seed {seed}, {programs} programs, {stages} stages"


@pytest.mark.parametrize("step", [64, 128])
def test_nan_reaches_only_rows_that_attend_to_it(step):
    """The second half of a first step is a copy of the first, and missing query rows of a block are copies too."""
    case = problem(21, Config(block_n=step), lengths=[[64, 192, 64, 128]], seen=0.5)
    want = case.allowed[:, [70, 300]].any(1)
    want[5] = True
    for tensor, row in ((case.k, 70), (case.v, 300), (case.q, 5)):
        tensor[row] = float("nan")
    out, _ = case.run()
    assert torch.equal(out.isnan().any(2).all(1), want) and torch.equal(out.isnan().any(2).any(1), want)
    assert 1 < want.sum() < len(want)


def _without(depth, line):
    """Remove a line that is indented ``depth`` times."""
    return [(f"\n{depth * '    '}{line}\n", "\n")]


def _moved(depth, line, before):
    """Move a line before another one."""
    line, before = f"\n{depth * '    '}{line}", f"\n{depth * '    '}{before}\n"
    return [(f"{line}\n", "\n"), (before, line + before)]


MASKED = [
    Config(),
    Config(block_n=64, num_stages=3),
    Config(blocks=2, num_stages=3),
    Config(block_n=64, blocks=8, in_turn=True),
]


@pytest.mark.parametrize("seed", range(12))
def test_masks_against_float64(seed):
    """Chunks of any length, causal or not, with windows, and query rows that are the last of their sequences."""
    config = MASKED[seed % len(MASKED)]._replace(masks=True)
    random_problem = random_plan_problem(random.Random(seed))
    generator = torch.Generator().manual_seed(seed)
    rows, keys = random_problem.layout.total_rows, random_problem.keys.total_rows
    q, k, v = (
        torch.randn(count, heads, 128, generator=generator).bfloat16()
        for count, heads in ((rows, 2 * config.heads), (keys, 2), (keys, 2))
    )
    case = Problem(random_problem.plan(), random_problem.allowed(), q, k, v, config, programs=3)
    case.check(*case.run(seed))


def masked_case():
    """Return a problem with items of partial tiles, of partial tiles and half a step, and without partial tiles."""
    layout = rk.ChunkLayout.from_lengths([[64, 41, 87, 64, 64]])
    seen = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]).bool()
    mask = rk.ChunkMask.from_dense([seen])
    plan, allowed = (make(layout, mask, causal=False) for make in (rk.plan_attention, allowed_pairs))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(320, heads, 128, generator=generator).bfloat16() for heads in (2, 1, 1))
    return Problem(plan, allowed, q, k, v, Config(masks=True), programs=2, shuffled=True)


# Each fault compiles, and would hang or corrupt results on a GPU, at least occasionally.
FAULTS = {
    "keys are not waited for": _without(4, "mbarrier.wait(k_ready.index(stage), (n + 1) // STAGES & 1)"),
    "the first keys are not waited for": _without(3, "mbarrier.wait(k_ready.index(stage), n // STAGES & 1)"),
    "values are not waited for": [
        (
            "stage_before = n % STAGES\n                mbarrier.wait(v_ready.index(stage_before), n // STAGES & 1)\n",
            "stage_before = n % STAGES\n",
        )
    ],
    "the last values are not waited for": _without(3, "mbarrier.wait(v_ready.index(stage), n // STAGES & 1)"),
    "query rows are not waited for": _without(3, "mbarrier.wait(q_ready.index(CONSUMER), tiles & 1)"),
    "buffers are not waited for": _without(1, "mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)"),
    "the rows' buffer is not waited for": _without(2, "mbarrier.wait(q_empty.index(consumer), phase ^ 1)"),
    "the producer waits for the other phase": [("(n // STAGES & 1) ^ 1)", "n // STAGES & 1)")],
    "consumers wait for the other phase": [("(n + 1) // STAGES & 1)", "((n + 1) // STAGES & 1) ^ 1)")],
    "the phase of query rows stays": [("(q_ready.index(CONSUMER), tiles & 1)", "(q_ready.index(CONSUMER), 0)")],
    "a phase for items without keys": [("            n += 1\n            tiles", "            n += 1\n        tiles")],
    "one consumer releases keys": [("(k_empty.index(stage), count=WARPGROUPS)", "(k_empty.index(stage), count=1)")],
    "three consumers release values": [("(v_empty.index(stage), count=WARPGROUPS)", "(v_empty.index(stage), count=3)")],
    "values are not released": _without(4, "mbarrier.arrive(v_empty.index(stage_before), count=1)"),
    "query rows are not released": _without(3, "mbarrier.arrive(q_empty.index(CONSUMER), count=1)"),
    "the first keys are released unread": _moved(
        3,
        "mbarrier.arrive(k_empty.index(stage), count=1)",
        "scores = warpgroup_mma(queries, keys, none, use_acc=False)",
    ),
    "keys are released while they are read": _moved(
        4, "mbarrier.arrive(k_empty.index(stage), count=1)", "stage_before = n % STAGES"
    ),
    "values are released while they are read": _moved(
        4,
        "mbarrier.arrive(v_empty.index(stage_before), count=1)",
        "scores = warpgroup_mma_wait(1, deps=(pending_scores,))",
    ),
    "query rows are released unread": _moved(
        3,
        "mbarrier.arrive(q_empty.index(CONSUMER), count=1)",
        "scores = warpgroup_mma(queries, keys, none, use_acc=False)",
    ),
    "too few bytes are expected": [("PIECES * desc.block_type.nbytes", "desc.block_type.nbytes")],
    "too many bytes are expected": [("PIECES * desc.block_type.nbytes", "3 * desc.block_type.nbytes")],
    "too few bytes of query rows are expected": [("OWN * q_desc.block_type.nbytes", "q_desc.block_type.nbytes")],
    "scores are taken before they are there": [("warpgroup_mma_wait(1, deps", "warpgroup_mma_wait(2, deps")],
    "sums are taken before they are there": [("warpgroup_mma_wait(0, deps", "warpgroup_mma_wait(1, deps")],
    "barriers are not fenced": [("    fence_async_shared()", "    #")],
    "half a step is not masked": [("BLOCK_N - pieces % 2 * PIECE, 0)", "BLOCK_N, 0)")],
    "a range is read beyond its end": [("over = key >= end", "over = key > end")],
    "the rows of another block": [("slice(own * 16, 16, dim=0)", "slice(0, 16, dim=0)")],
    "the last values are not copied": [
        ("    if n > 0:\n        _copy_step(v_desc", "    if n < 0:\n        _copy_step(v_desc")
    ],
}


# Faults with alternating consumers.
TURN_FAULTS = {
    "a turn is not passed on": [("mbarrier.arrive(turns.index(1 - CONSUMER), count=1)", "pass")],
    "both begin": [("(turn & 1) ^ (1 - CONSUMER)", "(turn & 1) ^ 1")],
    "none begins": [("(turn & 1) ^ (1 - CONSUMER)", "turn & 1")],
    "a turn is passed on to oneself": [("turns.index(1 - CONSUMER)", "turns.index(CONSUMER)")],
    "turns are not counted": _without(5, "turn += 1"),
}


# The same, where items have partial tiles.
MASK_FAULTS = {
    "a full tile is masked": [("code == -2, 0xFFFF", "code == -2, 0")],
    "what follows the last partial tile is attended to": [
        ("& (partial_tile < end)", "& (partial_tile <= end)"),
        ("- 1) * TILE_WORDS", ") * TILE_WORDS"),
    ],
    "the bits of other rows": [("(word >> (16 * (o_row % 2)))", "word")],
    "half a step after the partial tiles is not masked": [("if step <= masked_steps:", "if step < masked_steps:")],
    "a step after the partial tiles takes half": [("(step == masked_steps) & (pieces % 2 == 0)", "False")],
    "rows that have not attended to a key yet": [("if MASKS:  #", "if False:  #")],
    "values of partial tiles as if they were of ranges": [
        (
            "fmt: skip\n                _copy_step(\n                    "
            "v_descs, p_partial_tiles, v_head, v_masked > 0 if",
            "fmt: skip\n                _copy_step(\n                    v_descs, p_partial_tiles, v_head, False if",
        )
    ],
}


@pytest.mark.parametrize("fault", [*FAULTS, *TURN_FAULTS, *MASK_FAULTS])
def test_planted_faults_are_caught(fault):
    # Items with odd and even numbers of pieces, with one and three steps, with two ranges, and one without keys.
    seen = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 1, 0]]).bool()
    case = problem(30, lengths=[[64, 128, 64, 64, 64]], seen=[seen], programs=2)
    case.shuffled, case.config = True, Config(in_turn=fault in TURN_FAULTS)
    case = masked_case() if fault in MASK_FAULTS else case
    case.check(*case.run())
    for seed in range(12):
        try:
            case.check(*case.run(seed, {**FAULTS, **TURN_FAULTS, **MASK_FAULTS}[fault]))
        except AssertionError:
            return
    pytest.fail("no fault detected in 12 orders of events")


def test_the_work_is_all_there_and_shared_out_evenly():
    """12 % of 4,096 rows: the question's tiles attend to all of them, others to 64 and 384."""
    passages = Passages(4096, 16, 0.12)
    plan, pairs = passages.plan(), int(passages.dense().sum())
    # Tiles of 64 rows for 2 heads, of 32 for 4, of 64 for 1.
    for config, heads in ((Config(), 8 * 2), (Config(blocks=2), 8), (Config(block_n=64, warpgroups=1), 8 * 4)):
        work = hopper.divide(plan, 32, 8, programs=132, config=config)
        tiles = 4096 // (16 * config.blocks)
        assert sorted(map(tuple, work.items[:, :2].tolist())) == list(itertools.product(range(tiles), range(heads)))
        of_program = [int(items[:, 3].sum()) for items in work.items.tensor_split(work.starts[1:-1].tolist())]
        assert len(of_program) == 132 and sum(of_program) * 64 * 16 * config.blocks == pairs * heads
        assert max(of_program) <= max(4096 // 64, sum(of_program) / 132 + 7)


def test_the_work_is_on_the_cpu_with_any_default_device():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[256]]), causal=False)
    wanted = hopper.divide(plan, 8, 2, programs=4, config=Config())
    with torch.device("meta"):
        made = hopper.divide(plan, 8, 2, programs=4, config=Config())
    assert torch.equal(made.items, wanted.items) and torch.equal(made.ranges, wanted.ranges)


@pytest.mark.parametrize(
    ("arguments", "config", "error"),
    [
        (dict(causal=True), DEFAULT, "plan: got 16 partial tiles in groups of 4 blocks, needs none, or config.masks"),
        (dict(q_heads=3), DEFAULT, "q: got 3 heads for 1 of k, needs a multiple of 2 for each"),
        (dict(q_heads=4, kv_heads=3), DEFAULT, "q: got 4 heads for 3 of k"),
        ({}, Config(block_n=96), r"config: got Config\(block_n=96.*needs block_n of 64 or 128"),
        ({}, Config(num_stages=1), "needs block_n of 64 or 128, 1 or 2 warpgroups, and num_stages of 2 or more"),
        ({}, Config(blocks=2, warpgroups=1, in_turn=True), "config: got in_turn for 1 warpgroup, needs 2"),
        ({}, Config(blocks=1), "config: got 1 blocks, needs 2, 4 or 8 for 2 warpgroups"),
        ({}, Config(blocks=8, warpgroups=1), "config: got 8 blocks, needs 1, 2 or 4 for 1 warpgroups"),
        (dict(capacity=512), DEFAULT, "plan: got one with a capacity of 512 rows, needs one of the 256 rows alone"),
    ],
)
def test_work_that_is_refused(arguments, config, error):
    capacity = rk.PlanCapacity.for_rows(512, sequences=1) if arguments.pop("capacity", 0) else None
    layout = rk.ChunkLayout.from_lengths([[256]])
    plan = rk.plan_attention(layout, causal=arguments.pop("causal", False), capacity=capacity)
    with pytest.raises(ValueError, match=error):
        hopper.divide(plan, **(dict(q_heads=2, kv_heads=1, programs=2) | arguments), config=config)


@pytest.fixture
def call(monkeypatch):
    """Return a function that calls the op as on sm_90, with the given arguments replaced."""

    def call(rows=256, **given):
        plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[rows] if rows else []]), causal=False)
        monkeypatch.setattr(hopper.triton, "__version__", given.pop("triton", "3.7.1"))
        architecture = given.pop("architecture", "sm_90")
        monkeypatch.setattr(hopper.launch, "architecture", lambda device: architecture)
        work, scale = hopper.divide(plan, 2, 1, programs=2), given.pop("scale", SCALE)
        shapes = dict(q=(rows, 2, 128), k=(rows, 1, 128), v=(rows, 1, 128))
        made = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        q, k, v = (given.get(name, lambda tensor: tensor)(tensor) for name, tensor in made.items())
        return hopper.hopper_attention(q, k, v, work, scale)

    return call


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (dict(q=torch.Tensor.half), "q: got torch.float16, needs torch.bfloat16"),
        (dict(k=lambda k: k[..., :64]), r"k: got shape \[256, 1, 64\], needs \[T, H, 128\]"),
        (dict(v=lambda v: v[:128]), r"v: got shape \[128, 1, 128\], needs \[256, 1, 128\] as k"),
        (dict(q=lambda q: q[:128]), r"q: got shape \[128, 2, 128\], needs \[256, 2, 128\]"),
        (
            dict(k=lambda k: k.new_zeros(256, 1, 132)[..., :128]),
            r"k: got strides \(132, 132, 1\), needs multiples of 8",
        ),
        (dict(q=lambda q: q[:, :1].expand(-1, 2, -1)), r"q: got strides \(256, 0, 1\), needs multiples of 8"),
        (
            dict(v=lambda v: v.new_zeros(256 * 128 + 8)[4:-4].view(256, 1, 128)),
            "v: got memory that starts 8 bytes off, needs 16 bytes",
        ),
        (dict(k=lambda k: k.to("meta")), "k: got a tensor on meta, needs cpu as q"),
        (dict(scale=0.0), "scale: got 0.0, needs a positive number"),
        (dict(scale=float("nan")), "scale: got nan, needs a positive number"),
        (dict(triton="3.8.0"), "triton: got 3.8.0, needs 3.6 or 3.7"),
        (dict(architecture="sm_80"), "device: got sm_80, needs sm_90"),
    ],
)
def test_calls_that_are_refused(given, error, call):
    with pytest.raises(ValueError, match=error):
        call(**given)


def test_no_rows(call):
    out, lse = call(rows=0)
    assert out.shape == (0, 2, 128) and lse.shape == (0, 2)
