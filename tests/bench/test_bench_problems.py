"""The benchmarks' masks: every contender's format of a mask allows the same pairs."""

import pytest
import torch

import refrag_kernels as rk
from bench.cases import peers, problems, wheels
from bench.cases.prompts import Passages
from bench.engine.case import Skip, error_of

pytestmark = pytest.mark.cpp

PROBLEMS = {
    "causal": problems.causal(300),
    "documents": problems.documents(700),
    "blocks": problems.blocks(600),
    "interleaved": problems.interleaved(301),
    "random_passages": problems.random_passages(1000),
    "passages": problems.of_passages(Passages(1024, 16, 0.3)),
}


def of_layout(problem):
    """Return the allowed pairs by the definition of layout and mask, bool [T, T]."""
    lengths = [length for sequence in problem.layout.lengths() for length in sequence]
    chunk = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    counts = torch.tensor([len(sequence) for sequence in problem.layout.lengths()])
    sequence = torch.arange(len(counts)).repeat_interleave(counts)[chunk]
    row, seen = torch.arange(len(chunk)), sequence[:, None] == sequence
    if problem.causal:
        seen &= row[:, None] >= row
    if problem.mask is not None and problem.mask.passage_of_chunk is not None:
        passage = problem.mask.passage_of_chunk[chunk]
        seen &= (passage[:, None] == passage) | (passage[:, None] == -1) | (passage == -1)
    elif problem.mask is not None:
        allowed = torch.zeros(len(lengths), len(lengths), dtype=torch.bool)
        for number in range(len(lengths)):
            first, last = problem.mask.indptr[number : number + 2].tolist()
            allowed[number, problem.mask.indices[first:last].long()] = True
        seen &= allowed[chunk][:, chunk]
    return seen


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_forms_of_a_mask_allow_the_same_pairs(name):
    problem = PROBLEMS[name]
    visible, rows = problem.visible(0, problem.rows, "cpu"), problem.rows
    assert torch.equal(visible, of_layout(problem))
    assert problem.plan().stats()["pairs_allowed"] == int(visible.sum())
    assert torch.equal(problem.visible(7, 90, "cpu"), visible[7:90])
    if problem.pieces is not None:
        dense, first = torch.zeros_like(visible), 0
        for count, ranges in problem.pieces:
            keys = torch.cat([torch.arange(start, end) for start, end in ranges])
            for row in range(count):
                # The last row attends up to the last key, and each row before it to one key less.
                dense[first + row, keys[: len(keys) - (count - 1 - row)] if problem.causal else keys] = True
            first += count
        assert first == rows and torch.equal(dense, visible)
    mask = peers.block_mask(problem, 128, "cpu")
    tiles = (
        torch.nn.functional.pad(visible, (0, -rows % 128, 0, -rows % 128))
        .unflatten(0, (-1, 128))
        .unflatten(2, (-1, 128))
    )
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == int(tiles.any(3).any(1).sum())


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_reference_is_that_of_the_ops(name):
    problem = PROBLEMS[name]
    q, k, v = (torch.randn(problem.rows, heads, 8) for heads in (4, 2, 2))
    expected = peers.exact(q, k, v, problem)()
    wide = rk.mixed_attention(q.double(), k.double(), v.double(), problem.plan())
    assert error_of(wide, expected) < 1e-12
    if problem.pieces is not None and (not problem.causal or problem.keys_of_pieces() is None):
        assert error_of(peers.sdpa_in_pieces(q, k, v, problem)(), expected) < 2e-6


def test_sequences_of_a_library_are_the_pieces(monkeypatch):
    """Check the arguments of a varlen library with one that computes each sequence separately."""

    def library(q):
        def call(q, k, v, starts_q, starts_k, most_q, most_k, causal):
            found = []
            for number in range(len(starts_q) - 1):
                rows, keys = (slice(*starts[number : number + 2].tolist()) for starts in (starts_q, starts_k))
                n, m = rows.stop - rows.start, keys.stop - keys.start
                assert n <= most_q and m <= most_k
                a = [peers.batched(t) for t in (q[rows], k[keys], v[keys])]
                mask = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else None
                found.append(
                    torch.nn.functional.scaled_dot_product_attention(*a, mask, enable_gqa=True)[0].transpose(0, 1)
                )
            return torch.cat(found)

        return call

    for name in ("documents", "random_passages", "passages"):
        problem = PROBLEMS[name]
        q, k, v = (torch.randn(problem.rows, heads, 8) for heads in (4, 2, 2))
        call = wheels.in_pieces(library, q, k, v, problem)
        assert error_of(call(), peers.exact(q, k, v, problem)()) < 2e-6
    with pytest.raises(Skip, match="can't express"):
        wheels.in_pieces(library, q, k, v, PROBLEMS["blocks"])


def test_what_no_gpu_is_for_says_so():
    q = torch.zeros(8, 2, 16)
    for make in (wheels.torch_varlen, wheels.fa3, wheels.fa4):
        with pytest.raises(Skip, match="not installed|CUDA tensors only"):
            make(q)

    with pytest.raises(Skip, match="not installed|CUDA tensors only"):
        wheels.cudnn_flex(q, q, q, PROBLEMS["causal"])
    with pytest.raises(Skip, match="CUDA tensors only"):
        peers.forced_sdpa("flash", q, q, q)


def test_sizes_that_leave_no_room_are_skipped():
    for make in (problems.interleaved, problems.random_passages):
        with pytest.raises(Skip, match="too short|too few"):
            make(64)
    assert problems.documents(2).rows == problems.blocks(2).rows == 2
