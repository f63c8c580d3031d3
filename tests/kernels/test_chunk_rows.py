"""select_chunk_rows: every backend and dtype against a literal choice, and the op's integration with torch."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import refrag_kernels as rk
from refrag_kernels import backends
from tests.support.accuracy import DTYPES
from tests.support.factory import random_lengths
from tests.support.instruction_sets import LOWER, run_on

BACKENDS = backends.available("select_chunk_rows", torch.device("cpu"))
NAN, INF = float("nan"), float("inf")


def problem(seed, dtype):
    """Return views of keys and values with rows beyond the last chunk, chunk offsets and kept offsets."""
    rng = random.Random(seed)
    layout = rk.ChunkLayout.from_lengths(random_lengths(rng))
    heads, width, pad = rng.choice([1, 2, 3]), rng.choice([8, 16, 40, 64, 128]), rng.choice([0, 8])
    rows = layout.total_rows + rng.choice([0, 3])
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(2, heads, rows, width + pad, generator=generator).to(dtype)
    k, v = (tensor[..., :width].transpose(0, 1) for tensor in storage)
    keep = rng.choice([1, 2, 5, [rng.randint(0, 40) for _ in range(layout.num_chunks)]])
    return k, v, layout.chunk_offsets, rk.kept_offsets(layout.chunk_offsets, keep)


def select(k, v, offsets, kept, scores=None, **options):
    return rk.select_chunk_rows(k, v, offsets, kept, int(kept[-1]), scores, **options)


def chosen(scores, offsets, kept):
    """Sort each chunk's rows literally: NaN last, then by score, then by row."""
    columns = []
    for column in scores.T.tolist():
        rows = []
        for a, b, count in zip(offsets.tolist(), offsets.tolist()[1:], kept.diff().tolist()):
            ranked = sorted(range(a, b), key=lambda row: (column[row] != column[row], -column[row], row))
            rows += sorted(ranked[:count])
        columns.append(rows)
    return torch.tensor(columns, dtype=torch.int32).T


def unrotated(k, cos, sin):
    first, second, rest = k.split([cos.shape[1], cos.shape[1], k.shape[2] - 2 * cos.shape[1]], 2)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], 2)


def assert_gathered(result, k, v, rows):
    k_kept, v_kept, got = result
    assert torch.equal(got, rows) and got.dtype == torch.int32 and got.is_contiguous()
    for kept, tensor in ((k_kept, k), (v_kept, v)):
        want = tensor.gather(0, rows.long()[..., None].expand(-1, -1, k.shape[2]))
        assert kept.is_contiguous() and kept.dtype == k.dtype and torch.equal(kept, want)


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_scores(backend, dtype, seed):
    k, v, offsets, kept = problem(seed, dtype)
    # Few different scores, so that many are equal.
    scores = torch.randint(-3, 4, k.shape[:2], generator=torch.Generator().manual_seed(seed)).float()
    values = torch.tensor([NAN, -INF, -1.0, -0.0, 0.0, 1.0, INF])[scores.long() + 3]
    scores = values.T.contiguous().T if seed % 2 else values
    assert_gathered(select(k, v, offsets, kept, scores, backend=backend), k, v, chosen(scores, offsets, kept))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_the_distance_from_the_mean(backend, dtype, seed, rotated):
    k, v, offsets, kept = problem(seed, dtype)
    tables = {}
    wide = k.double()
    if rotated:
        half = random.Random(seed).choice([k.shape[2] // 2, max(1, k.shape[2] // 4), 3])
        angles = 100 * torch.rand(len(k), half, generator=torch.Generator().manual_seed(seed))
        tables = {"cos": angles.cos(), "sin": angles.sin()}
        wide = unrotated(wide, *(table.double() for table in tables.values()))
    mean = torch.zeros_like(wide)
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:]):
        mean[a:b] = wide[a:b].mean(0)
    scores = -torch.nn.functional.cosine_similarity(wide, mean, dim=2)
    want = chosen(scores, offsets, kept)
    result = select(k, v, offsets, kept, backend=backend, **tables)
    # Scores that differ by rounding may change places.
    differs = result[2] != want
    gap = scores.gather(0, result[2].long()) - scores.gather(0, want.long())
    assert not (gap.abs()[differs] > 1e-5).any(), f"seed {seed}"
    assert_gathered(result, k, v, result[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_are_ties_and_a_zero_key_is_neutral(backend):
    k = torch.randn(1, 1, 64).expand(9, 2, 64)
    offsets = torch.tensor([0, 8, 9], dtype=torch.int32)
    rows = select(k, k, offsets, rk.kept_offsets(offsets, 3), backend=backend)[2]
    assert rows.tolist() == [[0, 0], [1, 1], [2, 2], [8, 8]]
    # The cosines with the mean are 1, 0 and 1: the zero key is the most unlike one.
    k = torch.ones(3, 1, 8) * torch.tensor([1.0, 0.0, 2.0])[:, None, None]
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    assert select(k, k, offsets, rk.kept_offsets(offsets, 1), backend=backend)[2].item() == 1
    zero = torch.zeros(3, 1, 8)
    assert select(zero, zero, offsets, rk.kept_offsets(offsets, 2), backend=backend)[2].flatten().tolist() == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_keys_stay_in_their_chunk_and_head(backend):
    torch.manual_seed(0)
    k, v = torch.randn(24, 2, 16), torch.randn(24, 2, 16)
    offsets = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    kept = rk.kept_offsets(offsets, 2)
    want = select(k, v, offsets, kept, backend=backend)[2]
    for value in (NAN, INF):
        k[10, 1, 3] = value
        got = select(k, v, offsets, kept, backend=backend)[2]
        got[2:4, 1] = want[2:4, 1]
        assert torch.equal(got, want)
    # All scores of the chunk are NaN: its first rows are kept.
    k[10, 1, 3] = NAN
    assert select(k, v, offsets, kept, backend=backend)[2][2:4, 1].tolist() == [8, 9]


def check_long_chunk(backend, length):
    """Select from a chunk of many rows between two others, of which some, all or none are kept."""
    generator = torch.Generator().manual_seed(0)
    rows = 3 + length + 17
    k, v = torch.randn(2, rows, 2, 16, generator=generator)
    scores = torch.randn(rows, 2, generator=generator).round(decimals=1)
    offsets = torch.tensor([0, 3, 3 + length, rows], dtype=torch.int32)
    for keep in (1, [1, length // 3, 0], [0, length - 1, 17], rows):
        kept = rk.kept_offsets(offsets, keep)
        result = select(k, v, offsets, kept, scores, backend=backend)
        assert_gathered(result, k, v, chosen(scores, offsets, kept))
        _, _, want = select(k.double(), v.double(), offsets, kept)
        assert torch.equal(select(k, v, offsets, kept, backend=backend)[2], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_chunk(backend):
    check_long_chunk(backend, 600)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_those_kept_are_zero(backend):
    k, v = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    kept = rk.kept_offsets(offsets, 2)
    want = select(k, v, offsets, kept, backend=backend)
    got = rk.select_chunk_rows(k, v, offsets, kept, 7, backend=backend)
    assert all(torch.equal(a[:2], b) for a, b in zip(got, want))
    assert not got[0][2:].any() and not got[1][2:].any() and (got[2][2:] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    k, offsets = torch.randn(0, 2, 8), torch.zeros(1, dtype=torch.int32)
    assert [t.shape[0] for t in select(k, k, offsets, rk.kept_offsets(offsets, 1), backend=backend)] == [0, 0, 0]
    k_kept, _, rows = rk.select_chunk_rows(k, k, offsets, offsets, 3, backend=backend)
    assert not k_kept.any() and (rows == -1).all()
    k = torch.randn(5, 2, 8)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert select(k, k, offsets, rk.kept_offsets(offsets, 0), backend=backend)[2].shape == (0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_offsets_and_tables(backend):
    k, v, scores = torch.randn(9, 1, 8), torch.randn(9, 1, 8), torch.randn(9, 1)
    offsets = torch.tensor([0, 7, 2, 7, 9, 7], dtype=torch.int32)[::2]
    kept = torch.tensor([0, 7, 1, 7, 2, 7], dtype=torch.int32)[::2]
    want = select(k, v, offsets.contiguous(), kept.contiguous(), scores)
    assert_gathered(select(k, v, offsets, kept, scores, backend=backend), k, v, want[2])
    angles = torch.rand(9, 10)
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    want = select(k, v, offsets, kept, **{name: table[:, :4].contiguous() for name, table in tables.items()})
    got = select(k, v, offsets, kept, backend=backend, **{name: table[:, :4] for name, table in tables.items()})
    assert torch.equal(got[2], want[2])


def check_all():
    """Check the CPU's kernels. Run in a new process, since the instruction set is chosen once per process."""
    for dtype in DTYPES:
        for seed in range(8):
            test_by_the_distance_from_the_mean("cpu", dtype, seed, False)
            test_by_the_distance_from_the_mean("cpu", dtype, seed, True)
    test_equal_keys_are_ties_and_a_zero_key_is_neutral("cpu")
    check_long_chunk("cpu", 100)


@pytest.mark.parametrize("isa", LOWER)
def test_instruction_sets(isa):
    run_on(isa, __name__, "check_all")


def test_float64():
    k, v, offsets, kept = problem(2, torch.float64)
    scores = torch.randn(k.shape[:2], dtype=torch.float64)
    assert_gathered(select(k, v, offsets, kept, scores), k, v, chosen(scores, offsets, kept))
    assert select(k, v, offsets, kept)[0].dtype == torch.float64


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_opcheck(backend, scored):
    k, v, offsets, kept = problem(3, torch.float32)
    scores = torch.randn(k.shape[:2]) if scored else None
    tables = (None, None) if scored else (torch.ones(len(k), 4), torch.zeros(len(k), 4))
    args = (k, v, offsets, kept, int(kept[-1]), scores, *tables)
    torch.library.opcheck(torch.ops.refrag.select_chunk_rows.default, args, {"backend": backend})


@pytest.mark.compiles
def test_compiles_for_any_layout_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(
        lambda k, offsets, kept, n: rk.select_chunk_rows(k * 2, k, offsets, kept, n), fullgraph=True, backend=counter
    )
    for chunks in range(2, 12):
        k = torch.randn(8 * chunks, 2, 8)
        offsets = torch.arange(0, 8 * chunks + 1, 8, dtype=torch.int32)
        kept = rk.kept_offsets(offsets, 3)
        got = call(k, offsets, kept, int(kept[-1]))
        assert all(torch.equal(a, b) for a, b in zip(got, select(k * 2, k, offsets, kept)))
    assert counter.frame_count <= 2


def test_autocast_changes_nothing_and_no_gradient():
    k, v, offsets, kept = problem(3, torch.float32)
    want = select(k, v, offsets, kept)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(select(k, v, offsets, kept), want))
    with pytest.raises(RuntimeError, match="select_chunk_rows can't be differentiated"):
        select(k.detach().requires_grad_(), v, offsets, kept)[0].sum().backward()


@pytest.mark.parametrize("keep", [[1, 2, 8], (1, 2, 8), torch.tensor([1, 2, 8]), torch.tensor([1, 2, 8]).int()])
def test_kept_offsets(keep):
    offsets = torch.tensor([0, 8, 16, 19], dtype=torch.int32)
    got = rk.kept_offsets(offsets, keep)
    assert got.tolist() == [0, 1, 3, 6] and got.dtype == torch.int32
    assert rk.kept_offsets(offsets, 4).tolist() == [0, 4, 8, 11]
    assert rk.kept_offsets(offsets[:1], []).tolist() == rk.kept_offsets(offsets[:1], 2).tolist() == [0]


@pytest.mark.parametrize(
    ("offsets", "keep", "error", "message"),
    [
        ([0, 3], -1, ValueError, "keep: got -1, needs 0 to"),
        ([0, 3], 1.5, ValueError, r"keep: got shape \[\], needs \[1\]"),
        ([0, 3], True, TypeError, "keep: got True, needs an integer"),
        ([0, 3], [1.5], TypeError, "keep: got dtype float32, needs integers"),
        ([0, 3], [True], TypeError, "keep: got dtype bool, needs integers"),
        ([0, 3], [-2], ValueError, "keep: got -2, needs 0 or more"),
        ([0, 3], [1, 2], ValueError, r"keep: got shape \[2\], needs \[1\]"),
        ([1, 3], 1, ValueError, "chunk_offsets: got first 1, needs 0"),
        ([0, 3, 3], 1, ValueError, "chunk_offsets: got a length of 0 for chunk 1, needs at least 1"),
        ([], 1, ValueError, r"chunk_offsets: got shape \[0\], needs \[C \+ 1\]"),
    ],
)
def test_bad_kept_offsets(offsets, keep, error, message):
    with pytest.raises(error, match=message):
        rk.kept_offsets(torch.tensor(offsets, dtype=torch.int32), keep)


def test_kept_offsets_are_made_on_the_cpu():
    with pytest.raises(ValueError, match="chunk_offsets: got device meta, needs cpu"):
        rk.kept_offsets(torch.zeros(2, dtype=torch.int32, device="meta"), 1)
    with pytest.raises(TypeError, match="chunk_offsets: got dtype int64, needs int32"):
        rk.kept_offsets(torch.tensor([0, 1]), 1)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


rows, table = torch.randn(6, 2, 8), torch.ones(6, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": rows.int()}, TypeError, "k: got dtype int32, needs float32 or"),
        ({"v": rows.half()}, TypeError, "v: got dtype float16, needs float32, the dtype of k"),
        ({"v": rows[:5]}, ValueError, r"v: got shape \[5, 2, 8\], needs \[6, 2, 8\]"),
        ({"k": rows[0]}, ValueError, r"k: got shape \[2, 8\], needs \[T, H_kv, D\]"),
        ({"k": rows[..., :4], "v": rows[..., :4]}, ValueError, "k: got head_dim 4, needs a multiple of 8"),
        ({"k": torch.randn(6, 8, 2).mT}, ValueError, "k: got stride 2 in its last dimension"),
        ({"chunk_offsets": torch.tensor([0, 4, 6])}, TypeError, "chunk_offsets: got dtype int64, needs int32"),
        ({"chunk_offsets": int32()}, ValueError, r"chunk_offsets: got shape \[0\], needs \[C \+ 1\]"),
        ({"chunk_offsets": int32(0, 4, 7)}, ValueError, "got first 0 and last 7, needs 0 and at most the 6 rows of k"),
        ({"chunk_offsets": int32(1, 4, 6)}, ValueError, "chunk_offsets: got first 1"),
        ({"chunk_offsets": int32(0, 4, 4)}, ValueError, "chunk_offsets: got a length of 0 for chunk 1"),
        ({"chunk_offsets": int32(0, 6, 4)}, ValueError, "chunk_offsets: got a length of -2 for chunk 1"),
        ({"kept_offsets": int32(0, 3)}, ValueError, r"kept_offsets: got shape \[2\], needs \[3\]"),
        ({"kept_offsets": int32(1, 2, 3)}, ValueError, "kept_offsets: got first 1 and last 3, needs 0 and at most num"),
        ({"kept_offsets": int32(0, 2, 4)}, ValueError, "kept_offsets: got first 0 and last 4, needs 0 and at most num"),
        ({"kept_offsets": int32(0, 0, 3)}, ValueError, "kept_offsets: got 3 rows for chunk 1, needs 0 to 2, its len"),
        ({"kept_offsets": int32(0, 4, 3)}, ValueError, "kept_offsets: got -1 rows for chunk 1, needs 0 to 2"),
        ({"num_kept": -1}, ValueError, "num_kept: got -1, needs 0"),
        ({"num_kept": 1.5}, TypeError, "num_kept: got 1.5, needs an integer"),
        ({"scores": rows[..., 0].half()}, TypeError, "scores: got dtype float16, needs float32"),
        ({"scores": rows[:, 0, 0]}, ValueError, r"scores: got shape \[6\], needs \[6, 2\]"),
        ({"scores": rows[..., 0].to("meta")}, ValueError, "scores: got device meta, needs cpu, the device of k"),
        ({"cos": table}, ValueError, "sin: got None, needs a table"),
        ({"sin": table}, ValueError, "cos: got None, needs a table"),
        ({"cos": table.half(), "sin": table}, TypeError, "cos: got dtype float16, needs float32"),
        ({"cos": table[:5], "sin": table}, ValueError, r"cos: got shape \[5, 4\], needs \[6, R / 2\]"),
        ({"cos": table, "sin": table[:, :2]}, ValueError, r"sin: got shape \[6, 2\], needs \[6, 4\]"),
        ({"cos": torch.ones(6, 5), "sin": torch.ones(6, 5)}, ValueError, "cos: got 5 columns, needs 1 to 4"),
        ({"cos": table, "sin": torch.ones(4, 6).T}, ValueError, "sin: got stride 6 in its last dimension"),
        ({"cos": table, "sin": table, "scores": rows[..., 0]}, ValueError, "cos, sin: got tables together with scores"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend, changed, error, message):
    good = {"k": rows, "v": rows, "chunk_offsets": int32(0, 4, 6), "kept_offsets": int32(0, 2, 3), "num_kept": 3}
    with pytest.raises(error, match=message):
        rk.select_chunk_rows(**(good | changed), backend=backend)
