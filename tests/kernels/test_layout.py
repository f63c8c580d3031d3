"""ChunkLayout: offsets, round trips and bad lengths."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from refrag_kernels import ChunkLayout

lengths = st.lists(st.lists(st.integers(1, 70), max_size=12), max_size=5)


@hypothesis.given(lengths)
def test_offsets_are_running_sums(lengths):
    layout = ChunkLayout.from_lengths(lengths)
    flat = [length for sequence in lengths for length in sequence]
    assert layout.chunk_offsets.tolist() == [sum(flat[:i]) for i in range(len(flat) + 1)]
    assert layout.sequence_offsets.tolist() == [sum(map(sum, lengths[:i])) for i in range(len(lengths) + 1)]
    assert layout.sequence_chunks.tolist() == [sum(map(len, lengths[:i])) for i in range(len(lengths) + 1)]
    assert (layout.total_rows, layout.num_chunks, layout.num_sequences) == (sum(flat), len(flat), len(lengths))
    assert layout.lengths() == lengths
    assert {t.dtype for t in (layout.chunk_offsets, layout.sequence_chunks, layout.sequence_offsets)} == {torch.int32}


def test_integer_like_lengths_are_taken():
    assert ChunkLayout.from_lengths([torch.tensor([3, 4])]).chunk_offsets.tolist() == [0, 3, 7]


def test_moving_keeps_the_host_copy():
    layout = ChunkLayout.from_lengths([[3, 4], [1]])
    moved = layout.to("meta")
    assert moved.device.type == "meta" and moved.host() is layout and moved.to("cpu") is layout
    assert moved.total_rows == 8


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([[4, 2], [3, 0, 1]], ValueError, "lengths: got 0 for chunk 1 of sequence 1, needs at least 1"),
        ([[-5]], ValueError, "lengths: got -5 for chunk 0 of sequence 0"),
        ([[2**31]], (ValueError, RuntimeError), ""),
        ([[2**30, 2**30, 7]], ValueError, "rows in all"),
        ([[1.0]], TypeError, "lengths: got 1.0 for chunk 0 of sequence 0, needs an integer"),
        ([[], [True]], TypeError, "chunk 0 of sequence 1"),
        ([["16"]], TypeError, "needs an integer"),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        ChunkLayout.from_lengths(lengths)
