"""Classes check their values on construction, so constructors and ``dataclasses.replace`` bypass no check."""

import dataclasses
import random

import numpy
import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import tile_lists
from refrag_kernels.mask import MaskKind
from tests.support.factory import random_plan_problem

NAMES = [field.name for field in dataclasses.fields(rk.AttentionPlan) if field.name != "tiles"]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_a_good_layout_is_taken():
    layout = rk.ChunkLayout(int32(0, 4, 5, 11), int32(0, 2, 2, 3), int32(0, 5, 5, 11), numpy.int64(11))
    assert layout.lengths() == [[4, 1], [], [6]] and type(layout.total_rows) is int
    want = rk.plan_attention(rk.ChunkLayout.from_lengths([[4, 1], [], [6]]))
    for got, expected in zip(rk.plan_attention(layout).tensors(), want.tensors()):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chunk_offsets": torch.tensor([0, 4, 7])}, TypeError, "chunk_offsets: got dtype int64, needs int32"),
        ({"chunk_offsets": [0, 4, 7]}, TypeError, "chunk_offsets: got list, needs a torch.Tensor"),
        ({"chunk_offsets": int32(0, 4, 7)[:, None]}, ValueError, r"chunk_offsets: got shape \[3, 1\], needs one dim"),
        ({"chunk_offsets": int32(0, 9, 4, 9, 7)[::2]}, ValueError, "chunk_offsets: got shape .* contiguous"),
        ({"chunk_offsets": int32(0, 4, 7).to("meta")}, ValueError, "chunk_offsets: got device meta, needs cpu"),
        ({"chunk_offsets": int32(1, 4, 7)}, ValueError, "chunk_offsets: got 1 at its start, needs 0"),
        ({"chunk_offsets": int32(0, 4, 4)}, ValueError, "chunk_offsets: got 4 after 4 at 2, needs steps of at least 1"),
        ({"chunk_offsets": int32(0, 4, 8)}, ValueError, "chunk_offsets: got 8 at its end, needs 7, total_rows"),
        ({"sequence_chunks": int32()}, ValueError, r"sequence_chunks: got shape \[0\], needs .* not empty"),
        ({"sequence_chunks": int32(0, 1000)}, ValueError, "sequence_chunks: got 1000 at its end, needs 2, the number"),
        ({"sequence_chunks": int32(0, 1, 2)}, ValueError, r"sequence_offsets: got shape \[2\], needs \[3\]"),
        ({"sequence_offsets": int32(0, 6)}, ValueError, r"sequence_offsets: got \[0, 6\], needs the rows of"),
        ({"total_rows": 7.0}, TypeError, "total_rows: got 7.0, needs an integer"),
        ({"total_rows": -1}, ValueError, "total_rows: got -1, needs 0 to 2147483647"),
    ],
)
def test_a_bad_layout_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(rk.ChunkLayout.from_lengths([[4, 3]]), **changes)


def test_a_moved_layout_stays_one_with_its_copy():
    moved = rk.ChunkLayout.from_lengths([[4, 3]]).to("meta")
    with pytest.raises(ValueError, match=r"chunk_offsets: got shape \[5\], needs \[3\]"):
        dataclasses.replace(moved, chunk_offsets=torch.zeros(5, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match="total_rows: got 70, needs 7, as on the CPU"):
        dataclasses.replace(moved, total_rows=70)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rk.ChunkMask(MaskKind.CSR), ValueError, "indptr: got None, which a mask of kind CSR needs"),
        (lambda: rk.ChunkMask(MaskKind.CSR, indptr=int32(0, 0)), ValueError, "indices: got None, which a mask of kind"),
        (lambda: rk.ChunkMask(MaskKind.PASSAGES), ValueError, "passage_of_chunk: got None"),
        (lambda: rk.ChunkMask(MaskKind.PASSAGES, int32(0, -2)), ValueError, "passage_of_chunk: got -2 for chunk 1"),
        (lambda: rk.ChunkMask(MaskKind.FULL, int32(0)), ValueError, "passage_of_chunk: got values, needs None in a"),
        (lambda: rk.ChunkMask(MaskKind.PASSAGES, torch.zeros(1)), TypeError, "passage_of_chunk: got dtype float32"),
        (
            lambda: rk.ChunkMask(MaskKind.PASSAGES, int32(0)[None]),
            ValueError,
            r"passage_of_chunk: got shape \[1, 1\], ",
        ),
        (
            lambda: rk.ChunkMask(MaskKind.PASSAGES, torch.tensor([2**31])),
            ValueError,
            "passage_of_chunk: got values beyond",
        ),
        (lambda: rk.ChunkMask(MaskKind.PASSAGES, int32(0).to("meta")), ValueError, "got a meta tensor, needs one with"),
        (lambda: rk.ChunkMask.from_dense(torch.ones(1, 1).bool().to("meta")), ValueError, "allowed: got a meta tensor"),
        (lambda: rk.ChunkMask(7), TypeError, "kind: got 7, needs a MaskKind"),
    ],
)
def test_a_bad_mask_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_mask_by_its_constructor_is_the_mask_of_its_factory():
    layout = rk.ChunkLayout.from_lengths([[4, 3]])
    mask = rk.ChunkMask(MaskKind.CSR, indptr=torch.tensor([0, 1, 9, 2])[[0, 1, 3]], indices=torch.tensor([0, 1]))
    want = rk.plan_attention(layout, rk.ChunkMask.from_csr([0, 1, 2], [0, 1]))
    for got, expected in zip(rk.plan_attention(layout, mask).tensors(), want.tensors()):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("seed", range(60))
def test_a_good_plan_is_taken(seed):
    problem = random_plan_problem(random.Random(seed))
    capacity = rk.PlanCapacity.for_rows(2048, sequences=8, ranges_per_block=40) if seed % 2 else None
    plan = problem.plan(capacity=capacity)
    assert torch.equal(dataclasses.replace(plan).sizes, plan.sizes), f"seed {seed}"


def _but(plan, name, at, value):
    """Return a copy of a field with one value replaced."""
    tensor = getattr(plan, name).clone()
    tensor[at] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda p: _but(p, "sizes", 0, 3000), ValueError, "sizes: got 3000 at 0, needs 0 to 71"),
        (lambda p: _but(p, "sizes", 2, 2000), ValueError, "sizes: got 2000 at 2, needs 0 to 5"),
        (lambda p: _but(p, "sizes", 5, -1), ValueError, "sizes: got -1 at 5"),
        (lambda p: {"sizes": p.sizes[:7]}, ValueError, r"sizes: got shape \[7\], needs \[8\]"),
        (lambda p: {"sizes": p.sizes.long()}, TypeError, "sizes: got dtype int64, needs int32"),
        (lambda p: {"sizes": p.sizes.tolist()}, TypeError, "sizes: got list, needs a torch.Tensor"),
        (lambda p: {"q_blocks": p.q_blocks[:, :2]}, ValueError, r"q_blocks: got shape \[5, 2\], needs \[rows, 4\]"),
        (lambda p: {"q_blocks": p.q_blocks.T.contiguous().T}, ValueError, "q_blocks: got strides .* contiguous"),
        (lambda p: {"q_blocks": p.q_blocks.to("meta")}, ValueError, "q_blocks: got device meta, needs cpu"),
        (lambda p: {"full_offsets": p.full_offsets[:-1]}, ValueError, "full_offsets: got 5 rows, needs 6, by the rows"),
        (lambda p: _but(p, "q_blocks", (1, 1), 17), ValueError, "q_blocks: got a wrong entry at 1"),
        (lambda p: _but(p, "q_blocks", (1, 2), 7), ValueError, "q_blocks: got a wrong entry at 1"),
        (lambda p: _but(p, "q_blocks", (1, 3), 7000), ValueError, "q_blocks: got a wrong entry at 1"),
        (lambda p: _but(p, "q_row_block", 20, 5), ValueError, "q_row_block: got a wrong entry at 20"),
        (lambda p: _but(p, "kv_row_block", 20, 500), ValueError, "kv_row_block: got a wrong entry at 20"),
        (lambda p: _but(p, "full_offsets", 2, -1), ValueError, "full_offsets: got a wrong entry at 2, needs ascending"),
        (lambda p: _but(p, "full_offsets", -1, 900), ValueError, "full_offsets: got a wrong entry at 5"),
        (lambda p: _but(p, "full_ranges", (0, 1), 1600), ValueError, "full_ranges: got a wrong entry at 0"),
        (lambda p: _but(p, "full_ranges", (0, 0), 8), ValueError, "full_ranges: got a wrong entry at 0"),
        (lambda p: _but(p, "partial_offsets", -1, 900), ValueError, "partial_offsets: got a wrong entry at 5"),
        (lambda p: _but(p, "partial_keys", 0, 64), ValueError, "partial_keys: got a wrong entry at 0"),
        (lambda p: _but(p, "partial_keys", 1, 17), ValueError, "partial_keys: got a wrong entry at 1"),
        (lambda p: _but(p, "full_t_ranges", (0, 1), 1600), ValueError, "full_t_ranges: got a wrong entry at 0"),
        (lambda p: _but(p, "partial_t_tiles", (0, 0), 1600), ValueError, "partial_t_tiles: got a wrong entry at 0"),
        (lambda p: _but(p, "partial_t_tiles", (0, 1), -7), ValueError, "partial_t_tiles: got a wrong entry at 0"),
        (lambda p: {"tiles": list(p.sizes)}, TypeError, "tiles: got list, needs a tuple"),
        (lambda p: {"tiles": (p.sizes,)}, ValueError, "tiles: got 1 tensors, needs none or"),
    ],
)
def test_a_bad_plan_is_refused(changes, error, message):
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 13, 10], [28]]))
    with pytest.raises(error, match=message):
        dataclasses.replace(plan, **changes(plan))


def test_what_a_capacity_leaves_over_is_checked():
    capacity = rk.PlanCapacity.for_rows(256, sequences=2)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 13, 10], [28]]), capacity=capacity)
    for name, at in (("full_ranges", (-1, 1)), ("q_row_block", -1), ("partial_offsets", -1), ("q_blocks", (-1, 0))):
        with pytest.raises(
            ValueError, match=rf"{name}: got a wrong entry at \d+, needs -?\d+ beyond what sizes counts"
        ):
            dataclasses.replace(plan, **_but(plan, name, at, 1600))


def test_tile_lists_are_checked_by_their_shapes(monkeypatch):
    monkeypatch.setattr(tile_lists, "wanted", lambda device: True)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 13, 10], [28]]))
    assert len(dataclasses.replace(plan).tiles) == len(plan.tiles)
    with pytest.raises(ValueError, match=r"tiles\[1\]: got shape .* needs \[rows, 2\]"):
        dataclasses.replace(plan, tiles=(plan.tiles[0], *plan.tiles[:-1]))
    with pytest.raises(ValueError, match=r"tiles\[0\]: got device meta, needs cpu"):
        dataclasses.replace(plan, tiles=tuple(tensor.to("meta") for tensor in plan.tiles))


def test_torch_may_put_anything_in_the_place_of_a_plans_tensors():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 3]]))
    shapes = torch.utils._pytree.tree_map(lambda tensor: tensor.shape, plan)
    assert isinstance(shapes, rk.AttentionPlan) and shapes.sizes == (8,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rk.PlanCapacity(8, 8, 1, 1, -1, 1, 1), ValueError, "full_ranges: got -1, needs 0 to"),
        (lambda: rk.PlanCapacity(8.0, 8, 1, 1, 1, 1, 1), TypeError, "q_rows: got 8.0, needs an integer"),
        (lambda: rk.PlanCapacity(2**31, 8, 1, 1, 1, 1, 1), ValueError, "q_rows: got 2147483648, needs 0 to"),
        (lambda: rk.PlanCapacity.for_rows(-5, sequences=1), ValueError, "q_rows: got -5"),
        (lambda: rk.PlanCapacity.for_rows(64, sequences=1.5), TypeError, "sequences: got 1.5, needs an integer"),
    ],
)
def test_a_bad_capacity_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_integers_of_other_types_are_a_capacity():
    capacity = rk.PlanCapacity.for_rows(numpy.int64(64), sequences=numpy.int32(1))
    assert capacity == rk.PlanCapacity.for_rows(64, sequences=1) and type(capacity.q_rows) is int


def test_a_packed_projection_is_packed_again_with_other_weights():
    w1, w2, chunks = torch.randn(32, 16), torch.randn(24, 32), torch.randn(5, 16)
    packed = rk.PackedProjection.from_weights(torch.zeros(32, 16), None, w2, None)
    got = rk.project_chunks(chunks, dataclasses.replace(packed, w1=w1))
    assert torch.equal(got, rk.project_chunks(chunks, rk.PackedProjection.from_weights(w1, None, w2, None)))
    with pytest.raises(ValueError, match=r"w1: got shape \[16\], needs \[h, d_enc\]"):
        dataclasses.replace(packed, w1=w1[0])
    with pytest.raises(ValueError, match="activation: got 'mish', needs one of"):
        rk.PackedProjection(w1, None, w2, None, "mish")


@pytest.mark.parametrize("bias", [None, torch.randn(24)])
def test_functions_of_tensors_apply_to_a_packed_projection(bias):
    chunks, w1, w2 = torch.randn(5, 16), torch.randn(32, 16), torch.randn(24, 32)
    packed = rk.PackedProjection.from_weights(w1, None, w2, bias, "silu")
    cloned = torch.utils._pytree.tree_map(torch.clone, packed)
    assert cloned.activation == "silu" and cloned.w1 is not packed.w1 and cloned.packed is not packed.packed
    assert torch.equal(rk.project_chunks(chunks, cloned), rk.project_chunks(chunks, packed))
    call = torch.compile(rk.project_chunks, fullgraph=True, backend="eager")
    assert torch.equal(call(chunks, packed), rk.project_chunks(chunks, packed))


LAYOUT = rk.ChunkLayout.from_lengths([[4, 3]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rk.plan_attention([[4]]), "layout: got list, needs a ChunkLayout"),
        (lambda: rk.plan_attention(LAYOUT, "full"), "mask: got str, needs a ChunkMask"),
        (lambda: rk.plan_attention(LAYOUT, kv_layout=[[9]]), "kv_layout: got list, needs ChunkLayout or None"),
        (lambda: rk.plan_attention(LAYOUT, capacity=512), "capacity: got int, needs PlanCapacity or None"),
        (lambda: rk.plan_attention(LAYOUT, out=LAYOUT), "out: got ChunkLayout, needs AttentionPlan or None"),
        (lambda: dataclasses.replace(LAYOUT, _host="cpu"), "_host: got str, needs a ChunkLayout or None"),
        (lambda: rk.ChunkLayout.from_lengths(None), "lengths: got None, needs a list of lengths for each sequence"),
        (lambda: rk.ChunkLayout.from_lengths([[4], 3]), r"lengths: got \[\[4\], 3\] for sequence 1, needs a list of"),
        (lambda: rk.ChunkMask.from_dense(None), "allowed: got NoneType, needs a bool tensor or one per sequence"),
        (lambda: rk.ChunkMask.from_csr("ab", [0]), "indptr: got str, needs integers"),
        (lambda: rk.ChunkMask.passages([0, "a"]), "passage_of_chunk: got list, needs integers"),
        (lambda: rk.ChunkMask.passages(3), "passage_of_chunk: got int, needs integers"),
    ],
)
def test_other_types_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_visible_ranges_are_checked_where_they_are_used():
    """A NamedTuple or a plain pair is not checked on construction, so every call checks it."""
    q, pages = torch.randn(1, 1, 8), torch.randn(1, 16, 1, 8)
    tables = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    for visible, error, message in (
        (rk.VisibleRanges(torch.tensor([0, 1]), int32(0, 1)[None]), TypeError, "visible.indptr: got dtype int64"),
        (rk.VisibleRanges(int32(0, 9), int32(0, 1)[None]), ValueError, "visible.indptr: got 9 at its end"),
        ((int32(0, 1), int32(5, 1)[None]), ValueError, r"visible.ranges: got \[5, 1\] at 0"),
    ):
        for backend in ("cpu", "reference"):
            with pytest.raises(error, match=message):
                rk.paged_attention(q, pages, pages, *tables, visible=visible, backend=backend)
    layout, rows = rk.ChunkLayout.from_lengths([[4]]), torch.tensor([2])
    out = rk.VisibleRanges(torch.zeros(2), torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="out.indptr: got dtype float32, needs int32"):
        rk.visible_ranges(layout, rk.ChunkMask.full(), rows, out=out)
    with pytest.raises(ValueError, match=r"out.ranges: got shape \[4\], needs \[R, 2\]"):
        rk.visible_ranges(layout, rk.ChunkMask.full(), rows, out=rk.VisibleRanges(int32(0, 0), int32(0, 0, 0, 0)))


def test_no_plan_that_is_taken_leads_a_kernel_astray():
    """Plans with one or two wrong entries: those that pass the checks run without invalid accesses under test-asan."""
    rng = random.Random(0)
    taken = 0
    for turn in range(150):
        if turn % 25 == 0:
            problem = random_plan_problem(rng, max_sequences=3)
            plan = problem.plan()
            q, k = (torch.randn(rows, 1, 8) for rows in (problem.layout.total_rows, problem.keys.total_rows))
        changes = {}
        for name in rng.sample(NAMES, rng.randint(1, 2)):
            flat = getattr(plan, name).clone().flatten()
            if flat.numel():
                flat[rng.randrange(flat.numel())] = rng.choice([-1, 0, 1, 2, 15, 16, 17, 32, 48, 2**31 - 1])
            changes[name] = flat.view(getattr(plan, name).shape)
        try:
            changed = dataclasses.replace(plan, **changes)
        except ValueError:
            continue
        taken += 1
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, k)]
        for backend in ("cpu", "reference"):
            out = rk.mixed_attention(*leaves, changed, backend=backend)
            torch.autograd.grad(out.sum(), leaves)
    assert taken > 10
