"""paged_attention: every backend, dtype and feature against a dense float64 computation."""

from __future__ import annotations

import random

import pytest
import torch
import torch._dynamo.testing

import refrag_kernels as rk
from tests.support.accuracy import LSE, OUTPUT
from tests.support.instruction_sets import LOWER, run_on
from tests.support.paged_problems import (
    BACKENDS,
    COMBINATIONS,
    Problem,
    assert_rows_close,
    at_the_edge,
    make_problem,
    name_of,
)

LENGTHS = [1, 0, 37, 300, 16, 5, 520]  # below, at and beyond one page, one 16-key tile and one 256-key split
ROWS = [1, 0, 20, 25, 16, 0, 3]  # a whole prompt, none, a chunk of one, an expanded chunk

CASES: dict[str, dict] = {
    "decode": {},
    "prefill": {"rows": ROWS},
    "empty sequence with a row": {"lengths": [0, 3, 0], "rows": [2, 1, 0]},
    "no sequence": {"lengths": []},
    "no rows": {"lengths": [4, 9], "rows": [0, 0]},
    "one head a group": {"heads": (3, 3)},
    "one head a group, prefill": {"heads": (2, 2), "rows": ROWS},
    "9/3 heads": {"heads": (9, 3), "dim": 64},
    "9/3 heads, prefill": {"heads": (9, 3), "dim": 64, "rows": ROWS},
    "32/8 heads, D 128": {"heads": (32, 8), "dim": 128, "page": 16, "lengths": [530, 17]},
    "one key head of 20": {"heads": (20, 1), "rows": ROWS},
    "D 8": {"dim": 8},
    "D 40, prefill": {"dim": 40, "rows": ROWS},
    "D 256": {"dim": 256, "heads": (2, 1)},
    "D 248, prefill": {"dim": 248, "heads": (2, 1), "rows": ROWS},
    "page of 1": {"page": 1},
    "page of 7, prefill": {"page": 7, "rows": ROWS},
    "page beyond a split": {"page": 512, "rows": ROWS},
    "window": {"window": 5},
    "window over splits": {"window": 270},
    "window, prefill": {"window": 30, "rows": ROWS},
    "window pair": {"window": (280, 3), "rows": ROWS},
    "window of the row alone": {"window": (0, 0), "rows": ROWS},
    "unbounded window pair": {"window": (-1, -1)},
    "softcap": {"softcap": 2.5, "amplitude": 2.0},
    "softcap, prefill": {"softcap": 30.0, "rows": ROWS},
    "scale": {"scale": -0.3},
    "sinks": {"sinks": True},
    "sinks, prefill": {"sinks": True, "rows": ROWS, "window": 3},
    "visible": {"visible": True},
    "visible, prefill": {"visible": True, "rows": ROWS},
    "visible, window, sinks, softcap": {
        "visible": True, "rows": ROWS, "window": 200, "sinks": True, "softcap": 4.0, "page": 16,
    },
    "strided": {"wide": True},
    "strided, prefill": {"wide": True, "rows": ROWS, "heads": (6, 2), "dim": 24},
    "peaked": {"amplitude": 8.0, "rows": ROWS},
}  # fmt: skip


def problem_of(case: str, dtype: torch.dtype) -> Problem:
    options = {"lengths": LENGTHS, **CASES[case]}
    return make_problem(sum(map(ord, case)), dtype=dtype, **options)


def check_problem(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    out, lse = rk.paged_attention(*problem.args, **problem.options, return_lse=True, backend=backend)
    assert out.dtype == dtype and lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_rows_close(out, problem.out, OUTPUT, "out")
    assert_rows_close(lse, problem.lse, LSE, "lse")


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("case", CASES)
def test_equals_dense_float64(case, backend, dtype):
    check_problem(problem_of(case, dtype), backend, dtype)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_shapes(seed, backend):
    rng = random.Random(seed)
    kv_heads = rng.randint(1, 3)
    lengths = [rng.choice([0, 1, rng.randint(1, 40), rng.randint(200, 600)]) for _ in range(rng.randint(1, 5))]
    rows = rng.choice([None, [rng.randint(0, min(length, 70)) for length in lengths]])
    problem = make_problem(
        seed, lengths, rows, heads=(kv_heads * rng.randint(1, 9), kv_heads), dim=8 * rng.randint(1, 17),
        page=rng.randint(1, 40), window=rng.choice([None, rng.randint(1, 300)]), visible=rng.random() < 0.5,
        sinks=rng.random() < 0.5, softcap=rng.choice([None, 5.0]), wide=rng.random() < 0.5,
    )  # fmt: skip
    out, lse = rk.paged_attention(*problem.args, **problem.options, return_lse=True, backend=backend)
    assert_rows_close(out, problem.out, OUTPUT, f"seed {seed} out")
    assert_rows_close(lse, problem.lse, LSE, f"seed {seed} lse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_out_of_sight_are_not_read(backend):
    """Pages outside a sliding window are freed and reused, so their contents must not affect the result."""
    problem = make_problem(5, [300, 40], window=20, page=8)
    _, k_pages, v_pages, table, lengths = problem.args
    for b, length in enumerate(lengths.tolist()):
        for j in range(length - 20):
            for pages in (k_pages, v_pages):
                pages[table[b, j // 8], j % 8] = torch.nan
    out, lse = rk.paged_attention(*problem.args, **problem.options, return_lse=True, backend=backend)
    assert_rows_close(out, problem.out, OUTPUT, "out")
    assert_rows_close(lse, problem.lse, LSE, "lse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_two_to_the_31(backend, monkeypatch):
    """The second page starts 2^31 + 512 elements into the buffer; only touched pages use physical memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**31 + 512
    buffer = torch.empty(stride + 4096, dtype=torch.bfloat16)
    pages = [buffer.as_strided((2, 16, 2, 16), (stride, 32, 16, 1), i * 1024) for i in range(2)]
    problem = make_problem(0, [16], page=16, dtype=torch.bfloat16)
    table = torch.tensor([[1]], dtype=torch.int32)
    for view, source in zip(pages, problem.args[1:3], strict=True):
        view[1] = source[problem.args[3][0, 0]]
    out = rk.paged_attention(problem.args[0], *pages, table, problem.args[4], backend=backend)
    assert_rows_close(out, problem.out, OUTPUT, "out")


@pytest.mark.parametrize("case", ["decode", "prefill", "visible, prefill", "32/8 heads, D 128"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_bits_do_not_depend_on_the_thread_count(case, dtype):
    problem = problem_of(case, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(rk.paged_attention(*problem.args, **problem.options, return_lse=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def check_all_at_the_edge():
    """Check every case with tensors at the end of readable memory. Run in a new process, which a fault would kill."""
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            problem = problem_of(case, dtype)
            problem.args = tuple(at_the_edge(x) if x.is_contiguous() else x for x in problem.args)
            check_problem(problem, "cpu", dtype)


@pytest.mark.parametrize("isa", ["", *LOWER])
def test_every_instruction_set(isa):
    """Run the table in a new process, since the instruction set is chosen once per process; "" selects the best one."""
    run_on(isa, __name__, "check_all_at_the_edge")


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_keys_and_merge(backend):
    """Merged attention over disjoint sets of keys equals attention over all of them; one part has the sinks."""
    problem = make_problem(3, [90, 33, 4], rows=[5, 7, 2], heads=(6, 2), sinks=True, window=64)
    rows = len(problem.out)
    edges = torch.tensor([0, 13, 50, 1000], dtype=torch.int32)
    state = None
    for i in range(3):
        visible = (torch.arange(rows + 1, dtype=torch.int32), edges[i : i + 2].repeat(rows, 1))
        options = problem.options if i == 1 else {**problem.options, "sinks": None}
        part = rk.paged_attention(*problem.args, **options, visible=visible, return_lse=True, backend=backend)
        state = part if state is None else rk.merge_states(*state, *part, backend=backend)
    assert_rows_close(state[0], problem.out, OUTPUT, "out")
    assert_rows_close(state[1], problem.lse, LSE, "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["decode", "visible, window, sinks, softcap"])
def test_opcheck(case, backend):
    problem = problem_of(case, torch.float32)
    options = problem.options
    indptr, ranges = options.get("visible", (None, None))
    window = options["window"]
    torch.library.opcheck(
        torch.ops.refrag.paged_attention.default,
        (*problem.args, options.get("q_offsets"), indptr, ranges, 0.25, options["softcap"] or 0.0,
         -1 if window is None else window - 1, -1, options.get("sinks")),
        {"backend": backend},
    )  # fmt: skip


@pytest.mark.compiles
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def attend(q, k_pages, v_pages, table, lengths, q_offsets):
        return rk.paged_attention(
            q * 1.0, k_pages, v_pages, table, lengths, q_offsets=q_offsets, return_lse=True, backend=backend
        )

    # All sizes of the first call differ: dynamo would treat equal sizes as one symbol.
    for seed, (lengths, rows) in enumerate(
        [([33, 9, 7], [3, 4, 2]), ([50, 31], [1, 6]), ([12, 80, 3, 3], [9, 5, 1, 0])]
    ):
        problem = make_problem(seed, lengths, rows, heads=(6, 2), page=5)
        out, lse = attend(*problem.args, problem.options["q_offsets"])
        assert_rows_close(out, problem.out, OUTPUT, "out")
        assert_rows_close(lse, problem.lse, LSE, "lse")
    assert counter.frame_count == 1


def test_autocast_casts_the_query_to_the_cache():
    problem = make_problem(1, [40], dtype=torch.bfloat16)
    q, *cache = problem.args
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rk.paged_attention(q.float(), *cache), rk.paged_attention(q, *cache))
    problem = make_problem(1, [40], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rk.paged_attention(*problem.args).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_not_differentiable(backend):
    problem = make_problem(1, [9])
    q = problem.args[0].requires_grad_()
    out = rk.paged_attention(q, *problem.args[1:], backend=backend)
    with pytest.raises(RuntimeError, match="paged_attention can't be differentiated"):
        out.sum().backward()


def test_float64_goes_to_the_reference():
    problem = make_problem(1, [9], dtype=torch.float64)
    assert torch.equal(rk.paged_attention(*problem.args), rk.paged_attention(*problem.args, backend="reference"))
    with pytest.raises(RuntimeError, match="float64"):
        rk.paged_attention(*problem.args, backend="cpu")


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    ({"page_table": int32([0, 1, 9], [2, 3, 0])}, ValueError, r"page_table: got page 9 at \[0, 2\], needs 0 to 4"),
    ({"page_table": int32([0, 1, 2], [-1, 3, 0])}, ValueError, r"page_table: got page -1 at \[1, 0\], needs 0 to 4"),
    ({"kv_lengths": int32(13, 5)}, ValueError, r"kv_lengths: got 13 for sequence 0, needs 0 to 12 .* 3 pages of 4"),
    ({"kv_lengths": int32(9, -1)}, ValueError, "kv_lengths: got -1 for sequence 1, needs 0 to 12"),
    ({"kv_lengths": int32(1, 5)}, ValueError, "kv_lengths: got 1 for sequence 0, needs at least 2"),
    ({"q_offsets": int32(1, 2, 3)}, ValueError, "q_offsets: got 1 at its start, needs 0"),
    ({"q_offsets": int32(0, 4, 3)}, ValueError, "q_offsets: got 4 before 3 at sequence 1, needs ascending"),
    ({"q_offsets": int32(0, 2, 2)}, ValueError, "q_offsets: got 2 at its end, needs 3"),
    ({"q_offsets": int32(0, 2**31 - 1, 3)}, ValueError, "q_offsets: got 2147483647 before 3"),
    ({"visible": (int32(1, 1, 1, 2), int32([0, 1], [2, 3]))}, ValueError, "visible.indptr: got 1 at its start"),
    ({"visible": (int32(0, 2, 1, 2), int32([0, 1], [2, 3]))}, ValueError, "visible.indptr: got 2 before 1 at row 1"),
    ({"visible": (int32(0, 1, 2, 3), int32([0, 1], [2, 3]))}, ValueError, "visible.indptr: got 3 at its end.* most 2"),
    ({"visible": (int32(0, 2, 2, 2), int32([2, 3], [0, 1]))}, ValueError, r"visible.ranges: got \[0, 1\] after \[2, 3"),
    ({"visible": (int32(0, 2, 2, 2), int32([0, 3], [4, 2]))}, ValueError, r"visible.ranges: got \[4, 2\] at 1, needs"),
    ({"visible": (int32(0, 2, 2, 2), int32([-1, 3], [4, 5]))}, ValueError, r"visible.ranges: got \[-1, 3\] at 0"),
    ({"visible": (int32(0, 1), int32([0, 3]))}, ValueError, r"visible.indptr: got shape \[2\], needs \[4\]"),
    ({"q_offsets": None}, ValueError, "q: got 3 rows, needs 2, one per sequence, or q_offsets"),
    ({"q_offsets": int32(0, 3)}, ValueError, r"q_offsets: got shape \[2\], needs \[3\]"),
    ({"q": torch.zeros(3, 3, 16)}, ValueError, "q: got 3 heads, needs a multiple of the 2 key/value heads"),
    ({"q": torch.zeros(3, 4, 12)}, ValueError, "q: got head_dim 12, needs a multiple of 8 up to 256"),
    ({"q": torch.zeros(3, 4, 264)}, ValueError, "q: got head_dim 264"),
    ({"q": torch.zeros(3, 4, 8)}, ValueError, r"k_pages: got shape \[5, 4, 2, 16\], needs \[P, page, H_kv, 8\]"),
    ({"q": torch.zeros(3, 4, 32)[..., ::2]}, ValueError, "q: got stride 2 in its last dimension"),
    ({"q": torch.zeros(3, 4, 16).half()}, TypeError, "k_pages: got dtype float32, needs float16"),
    ({"q": torch.zeros(3, 4, 16).int()}, TypeError, "q: got dtype int32, needs float32 or"),
    ({"q": torch.zeros(3, 4, 16, device="meta")}, ValueError, "k_pages: got device cpu, needs meta"),
    ({"v_pages": torch.zeros(5, 4, 2, 24)}, ValueError, r"v_pages: got shape \[5, 4, 2, 24\], needs \[5, 4, 2, 16\]"),
    ({"k_pages": torch.zeros(5, 0, 2, 16), "v_pages": torch.zeros(5, 0, 2, 16)}, ValueError, "k_pages: got shape"),
    ({"page_table": torch.zeros(2, 3)}, TypeError, "page_table: got dtype float32, needs int32"),
    ({"page_table": int32([0, 1, 2])}, ValueError, r"page_table: got shape \[1, 3\], needs \[2, max_pages\]"),
    ({"kv_lengths": torch.tensor([9, 5])}, TypeError, "kv_lengths: got dtype int64, needs int32"),
    ({"softcap": 0.0}, ValueError, "softcap: got 0.0, needs a positive number"),
    ({"window": 0}, ValueError, "window: got 0, needs at least 1"),
    ({"window": (-2, 0)}, ValueError, r"window: got \(-2, 0\)"),
    ({"sinks": torch.zeros(3)}, ValueError, r"sinks: got shape \[3\], needs \[4\]"),
    ({"sinks": torch.zeros(4).double()}, TypeError, "sinks: got dtype float64, needs float32"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(change, error, message, backend):
    call = {
        "q": torch.zeros(3, 4, 16), "k_pages": torch.zeros(5, 4, 2, 16), "v_pages": torch.zeros(5, 4, 2, 16),
        "page_table": int32([0, 1, 2], [3, 4, -7]), "kv_lengths": int32(9, 5), "q_offsets": int32(0, 2, 3),
    }  # fmt: skip
    rk.paged_attention(**call, backend=backend)
    with pytest.raises(error, match=message):
        rk.paged_attention(**{**call, **change}, backend=backend)
