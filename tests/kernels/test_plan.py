"""plan_attention against its specification: the pairs a plan stands for, its transpose, capacities and bad input."""

import copy as copy_module
import dataclasses
import io
import pickle
import random
import re
import time
from pathlib import Path

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import tile_lists
from refrag_kernels.plan import TILE
from refrag_kernels.plan_fields import PlanField, PlanSize
from refrag_kernels.reference.mask import pairs_of_plan
from tests.support.factory import random_plan_problem


def transposed_pairs(plan):
    """Expand the transposed half of a plan to a bool matrix [T_q, T_kv], in plain Python."""
    sizes = plan.sizes.tolist()
    allowed = torch.zeros(sizes[PlanSize.Q_ROWS], sizes[PlanSize.KV_ROWS], dtype=torch.bool)
    blocks, bits = plan.q_blocks.tolist(), plan.partial_bits.tolist()
    for tile, (key, count, first_query, queries) in enumerate(plan.kv_blocks.tolist()[: sizes[PlanSize.KV_BLOCKS]]):
        for start, end in plan.full_t_ranges[plan.full_t_offsets[tile] : plan.full_t_offsets[tile + 1]].tolist():
            assert count == TILE and first_query <= start < end <= first_query + queries
            assert not allowed[start:end, key : key + TILE].any()
            allowed[start:end, key : key + TILE] = True
        entries = plan.partial_t_tiles[plan.partial_t_offsets[tile] : plan.partial_t_offsets[tile + 1]].tolist()
        assert entries == sorted(entries)
        for block, index in entries:
            assert plan.partial_keys[index] == key
            for row in range(blocks[block][1]):
                word = bits[index][row // 2] >> (16 * (row % 2))
                for column in range(count):
                    if word >> column & 1:
                        allowed[blocks[block][0] + row, key + column] = True
    return allowed


@pytest.mark.parametrize(("enum", "prefix"), [(PlanField, "k"), (PlanSize, "kNum")])
def test_the_enums_of_python_and_of_cpp_name_the_same_fields(enum, prefix):
    header = (Path(__file__).parents[2] / "csrc" / "plan_fields.h").read_text()
    body = re.search(rf"enum {enum.__name__} \{{(.*?)\}}", header, re.DOTALL).group(1)
    names = [name.strip() for name in body.split(",")]
    in_python = [prefix + field.name.title().replace("_", "") for field in enum]
    assert names == [*in_python, f"kNum{enum.__name__}s"] and list(enum) == list(range(len(enum)))


def test_fields_of_a_plan_are_passed_by_their_enum():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 1]]), device="cpu")
    tensors = plan.tensors()
    for field in PlanField:
        assert tensors[field] is getattr(plan, field.name.lower())
    assert [f.name for f in dataclasses.fields(plan)] == [*(field.name.lower() for field in PlanField), "tiles"]


@pytest.mark.parametrize("first_seed", range(0, 200, 20))
def test_pairs_and_transpose_follow_the_specification(first_seed):
    for seed in range(first_seed, first_seed + 20):
        problem = random_plan_problem(random.Random(seed))
        plan, allowed = problem.plan(), problem.allowed()
        assert torch.equal(pairs_of_plan(plan.tensors()), allowed), f"seed {seed}"
        assert torch.equal(transposed_pairs(plan), allowed), f"seed {seed}"
        assert plan.stats()["pairs_allowed"] == int(allowed.sum()), f"seed {seed}"


@pytest.mark.parametrize("seed", range(30))
def test_tiles_are_full_wherever_they_can_be(seed):
    """No tile that every row of its block sees is left partial, none is listed that no row sees, and lists ascend."""
    problem = random_plan_problem(random.Random(seed))
    plan, allowed = problem.plan(), problem.allowed()
    for block, (start, count, first_key, keys) in enumerate(plan.q_blocks.tolist()[: plan.sizes[2]]):
        full = plan.full_ranges[plan.full_offsets[block] : plan.full_offsets[block + 1]].tolist()
        partial = plan.partial_keys[plan.partial_offsets[block] : plan.partial_offsets[block + 1]].tolist()
        assert partial == sorted(set(partial))
        assert all(a[1] < b[0] for a, b in zip(full, full[1:])), "full ranges ascend and adjacent ones are merged"
        full_tiles = {key for a, b in full for key in range(a, b, TILE)}
        for key in range(first_key, first_key + keys, TILE):
            tile = allowed[start : start + count, key : min(key + TILE, first_key + keys)]
            whole = key + TILE <= first_key + keys and bool(tile.all())
            assert (key in full_tiles) == whole and (key in partial) == (bool(tile.any()) and not whole)


def test_every_row_belongs_to_its_block():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 3], [], [1], [33]]))
    blocks = plan.q_blocks.tolist()
    for row, block in enumerate(plan.q_row_block.tolist()):
        assert blocks[block][0] <= row < blocks[block][0] + blocks[block][1]
    assert torch.equal(plan.q_row_block, plan.kv_row_block)
    assert plan.q_blocks[:, 1].tolist() == [16, 7, 1, 16, 16, 1]


@pytest.mark.parametrize("seed", range(20))
def test_capacity_gives_the_same_pairs_and_refills_in_place(seed):
    rng = random.Random(seed)
    capacity = rk.PlanCapacity.for_rows(2048, sequences=8, ranges_per_block=40)
    out = None
    for _ in range(3):
        problem = random_plan_problem(rng)
        refilled = problem.plan(capacity=capacity, out=out)
        assert out is None or refilled is out
        out = refilled
        pairs = pairs_of_plan(out.tensors())
        rows, keys = problem.allowed().shape
        assert torch.equal(pairs[:rows, :keys], problem.allowed()), f"seed {seed}"
        assert not pairs[rows:].any() and not pairs[:, keys:].any()
        assert torch.equal(transposed_pairs(out), problem.allowed()), f"seed {seed}"
        assert out.stats() == problem.plan().stats()


def test_moving_a_plan_moves_all_of_it():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 3]]))
    moved = plan.to("meta")
    assert [t.shape for t in moved.tensors()] == [t.shape for t in plan.tensors()]
    assert moved.device.type == "meta" and plan.to("cpu") is plan
    buffers = {t.untyped_storage().data_ptr() for t in plan.tensors()}
    assert len(buffers) == 1, "one buffer, so that one copy moves a plan"


def test_copies_of_a_plans_tensors_are_a_plan():
    """Cloned one by one they are no views of one buffer; the plan moves, refills and pickles all the same."""
    capacity = rk.PlanCapacity.for_rows(64, sequences=2)
    first, second = (rk.ChunkLayout.from_lengths(lengths) for lengths in ([[20, 3]], [[7], [30]]))
    plan, want = (rk.plan_attention(layout, capacity=capacity) for layout in (first, second))
    cloned = torch.utils._pytree.tree_map(torch.clone, plan)
    assert [t.shape for t in cloned.to("meta").tensors()] == [t.shape for t in plan.tensors()]
    for copy in (copy_module.deepcopy(cloned), pickle.loads(pickle.dumps(cloned)), copy_module.copy(cloned)):
        assert all(torch.equal(a, b) for a, b in zip(copy.tensors(), plan.tensors()))
        assert len({t.untyped_storage().data_ptr() for t in copy.tensors()}) == 1
    held = cloned.q_blocks
    assert rk.plan_attention(second, capacity=capacity, out=cloned) is cloned
    assert all(torch.equal(a, b) for a, b in zip(cloned.tensors(), want.tensors())) and cloned.q_blocks is held


def test_a_plans_pickle_is_its_buffer():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[200, 30]]))
    size = plan.sizes.untyped_storage().nbytes()
    assert len(pickle.dumps(plan)) < size + 4096
    saved = io.BytesIO()
    torch.save(plan, saved)
    saved.seek(0)
    for copy in (pickle.loads(pickle.dumps(plan)), torch.load(saved, weights_only=False), copy_module.deepcopy(plan)):
        assert all(torch.equal(a, b) for a, b in zip(copy.tensors(), plan.tensors()))
        assert copy.sizes.data_ptr() != plan.sizes.data_ptr()


def test_a_plan_with_tile_lists_is_refilled_where_it_is(monkeypatch):
    """As on a GPU: the layout is on the CPU, and no device is named."""
    monkeypatch.setattr(tile_lists, "wanted", lambda device: device.type == "meta")
    layout, capacity = rk.ChunkLayout.from_lengths([[20, 3]]), rk.PlanCapacity.for_rows(64, sequences=2)
    plan = rk.plan_attention(layout, capacity=capacity, device="meta")
    assert plan.tiles and rk.plan_attention(layout, capacity=capacity, out=plan) is plan
    moved = rk.plan_attention(layout, capacity=capacity).to("meta")
    assert [t.shape for t in moved.tensors()] == [t.shape for t in plan.tensors()]
    assert rk.plan_attention(layout, capacity=capacity, out=moved) is moved
    with pytest.raises(ValueError, match="out: got a plan on meta, needs one on cpu"):
        rk.plan_attention(layout, capacity=capacity, out=plan, device="cpu")
    without = rk.plan_attention(layout)
    assert [t.shape for t in without.to("meta").tiles] == [
        t.shape for t in rk.plan_attention(layout, device="meta").tiles
    ]


def test_a_plan_is_a_pytree():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 3]]))
    leaves, spec = torch.utils._pytree.tree_flatten(plan)
    assert len(leaves) == len(plan.tensors()) and isinstance(
        torch.utils._pytree.tree_unflatten(leaves, spec), type(plan)
    )


def test_a_plan_waits_for_its_copy_to_the_cpu(monkeypatch):
    """What is read of a copy that nobody waited for may not have arrived."""
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 3]]))
    words = plan.sizes.untyped_storage().nbytes() // 4
    on_device = plan.to("meta")
    waited = []

    def copied(tensor, device, non_blocking=False):
        waited.append((device.type, not non_blocking))
        return plan.sizes.as_strided((words,), (1,)).clone()

    monkeypatch.setattr(torch.Tensor, "to", copied)
    on_device.to("cpu")
    on_device.to("cuda")
    assert waited == [("cpu", True), ("cuda", False)]


def test_any_integer_dtype_makes_the_same_plan():
    layout = rk.ChunkLayout.from_lengths([[3, 4, 5]])
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        mask = rk.ChunkMask.from_csr(torch.tensor([0, 1, 2, 4], dtype=dtype), torch.tensor([0, 1, 0, 2], dtype=dtype))
        dense = rk.ChunkMask.from_dense(torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool))
        for a, b in zip(rk.plan_attention(layout, mask).tensors(), rk.plan_attention(layout, dense).tensors()):
            assert torch.equal(a, b)


def test_time_of_a_plan_grows_with_tiles_not_pairs():
    """8 sequences of 4,096 rows in 256 chunks: 134 million pairs, 2,048 blocks; the bound is 5 ms."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # the filling is not what is timed
    layout = rk.ChunkLayout.from_lengths([[16] * 256] * 8)
    passages = rk.ChunkMask.passages(torch.arange(2048) % 256 // 8 - 1)
    for mask, causal in ((rk.ChunkMask.full(), True), (passages, True), (rk.ChunkMask.diagonal(), False)):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            rk.plan_attention(layout, mask, causal=causal)
            times.append(time.perf_counter() - start)
        assert min(times) < 5e-3


layout = rk.ChunkLayout.from_lengths([[4, 4], [4]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rk.plan_attention(layout, "full"), TypeError, "mask: got str, needs a ChunkMask"),
        (lambda: rk.plan_attention([[4]]), TypeError, "layout: got list, needs a ChunkLayout"),
        (lambda: rk.ChunkMask.passages([0, -2]), ValueError, "passage_of_chunk: got -2 for chunk 1, needs -1 or more"),
        (lambda: rk.ChunkMask.passages([0.5]), TypeError, "passage_of_chunk: got dtype float32, needs integers"),
        (lambda: rk.plan_attention(layout, rk.ChunkMask.passages([0, 1])), ValueError, "got 2 entries .* needs 3"),
        (lambda: rk.ChunkMask.from_dense(torch.ones(3, 3)), TypeError, "allowed: got torch.float32, needs a bool"),
        (lambda: rk.ChunkMask.from_dense([torch.ones(2, 3).bool()]), ValueError, r"allowed\[0\]: got shape \[2, 3\]"),
        (
            lambda: rk.plan_attention(layout, rk.ChunkMask.from_dense(torch.ones(3, 3).bool())),
            ValueError,
            "indices: got 2 for chunk 0, needs a chunk of its own sequence 0.*can't cross sequences",
        ),
        (
            lambda: rk.plan_attention(layout, rk.ChunkMask.from_csr([0, 1, 2, 3], [0, 3, 2])),
            ValueError,
            r"indices: got 3 for chunk 1, needs a chunk in \[0, 3\)",
        ),
        (
            lambda: rk.plan_attention(layout, rk.ChunkMask.from_csr([0, 2, 2, 2], [1, 0])),
            ValueError,
            "indices: got 0 for chunk 0 after 1, needs ascending values",
        ),
        (
            lambda: rk.plan_attention(layout, rk.ChunkMask.from_csr([0, 2, 1, 2], [0, 1])),
            ValueError,
            "indptr: got 1 after 2 at chunk 1, needs ascending values",
        ),
        (
            lambda: rk.plan_attention(layout, rk.ChunkMask.from_csr([0, 1, 1, 1], [0, 1])),
            ValueError,
            "indptr: got first 0 and last 1, needs 0 and the number of indices, 2",
        ),
        (lambda: rk.plan_attention(layout, causal=False, window=4), ValueError, "window: got the int 4 without causal"),
        (lambda: rk.plan_attention(layout, window=0), ValueError, "window: got 0, needs at least 1"),
        (lambda: rk.plan_attention(layout, window=(-2, 1)), ValueError, r"window: got \(-2, 1\), needs -1 or more"),
        (
            lambda: rk.plan_attention(layout, kv_layout=rk.ChunkLayout.from_lengths([[9]])),
            ValueError,
            "kv_layout: got 1 sequences, needs 2",
        ),
        (
            lambda: rk.plan_attention(layout, kv_layout=rk.ChunkLayout.from_lengths([[9], [3]])),
            ValueError,
            "kv_layout: got 3 rows in sequence 1, needs at least the 4 of layout",
        ),
        (
            lambda: rk.plan_attention(layout, capacity=rk.PlanCapacity.for_rows(10, sequences=2)),
            ValueError,
            "capacity: got q_rows=10, needs at least 12",
        ),
        (lambda: rk.plan_attention(layout, out=rk.plan_attention(layout)), ValueError, "out: needs the capacity"),
        (
            lambda: rk.plan_attention(
                layout, out=rk.plan_attention(layout), capacity=rk.PlanCapacity.for_rows(64, sequences=2)
            ),
            ValueError,
            "out: got a plan of another capacity",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
