"""ChunkLayout: which rows of a packed batch belong to which chunk and which sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from refrag_kernels.validation import INT32_MAX, as_int, check_dtype, check_shape, unchecked


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkLayout:
    """The chunks and sequences of a packed batch.

    Rows of all sequences are packed, without padding. A span of text is a chunk like any other: a slot is
    a chunk of 1 row, an expanded chunk has k rows, and a question has one row per token.

    Attributes
    ----------
    chunk_offsets : Tensor, int32 [C + 1]
        First row of each chunk; the last entry is the number of rows.
    sequence_chunks : Tensor, int32 [B + 1]
        First chunk of each sequence.
    sequence_offsets : Tensor, int32 [B + 1]
        First row of each sequence.
    total_rows : int
        T, the number of rows of the batch.

    Raises
    ------
    TypeError, ValueError
        If the tensors are not int32 on the CPU, or their values contradict each other. ``to`` moves a layout.

    Examples
    --------
    >>> from refrag_kernels import ChunkLayout
    >>> layout = ChunkLayout.from_lengths([[4, 1, 1, 2], [3]])
    >>> layout.chunk_offsets.tolist(), layout.sequence_chunks.tolist(), layout.sequence_offsets.tolist()
    ([0, 4, 5, 6, 8, 11], [0, 4, 5], [0, 8, 11])
    >>> layout.total_rows, layout.num_chunks, layout.num_sequences
    (11, 5, 2)
    """

    chunk_offsets: torch.Tensor
    sequence_chunks: torch.Tensor
    sequence_offsets: torch.Tensor
    total_rows: int
    # The layout on the CPU, where plans are made: kept so that planning for a layout on a GPU needs no copy back.
    _host: ChunkLayout | None = dataclasses.field(default=None, repr=False)

    @staticmethod
    def from_lengths(lengths: Sequence[Sequence[int]]) -> ChunkLayout:
        """Make a layout from the chunk lengths of each sequence.

        Parameters
        ----------
        lengths : sequence of sequences of int
            One list per sequence: the number of rows of each of its chunks, at least 1 each. A list may be empty.

        Returns
        -------
        ChunkLayout
            On the CPU.

        Raises
        ------
        ValueError
            If a length is below 1 or the batch has more than 2^31 - 1 rows; names the sequence and the chunk.
        TypeError
            If a length is not an integer, or ``lengths`` not a sequence of sequences.
        """
        flat: list[int] = []
        starts = [0]
        try:
            for sequence in lengths:
                flat.extend(sequence)
                starts.append(len(flat))
        except TypeError:
            where = "" if lengths is None or not starts[1:] else f" for sequence {len(starts) - 1}"
            raise TypeError(
                f"lengths: got {lengths!r:.100}{where}, needs a list of lengths for each sequence"
            ) from None
        if not all(type(length) is int for length in flat):
            # Integers of other types (NumPy's, 0-d tensors) are accepted; floats and strings are not.
            flat = [_as_int(length, *_position(starts, i)) for i, length in enumerate(flat)]
        if flat and min(flat) < 1:
            chunk = next(i for i, length in enumerate(flat) if length < 1)
            sequence_index, chunk_index = _position(starts, chunk)
            raise ValueError(
                f"lengths: got {flat[chunk]} for chunk {chunk_index} of sequence {sequence_index}, needs at least 1"
            )
        total = sum(flat)
        if total > INT32_MAX:
            raise ValueError(f"lengths: got {total} rows in all, needs at most {INT32_MAX}")
        # The device is explicit, as torch.set_default_device may have set another one: the planner reads these.
        chunk_offsets = torch.zeros(len(flat) + 1, dtype=torch.int32, device="cpu")
        torch.cumsum(torch.tensor(flat, dtype=torch.int32, device="cpu"), 0, out=chunk_offsets[1:])
        sequence_chunks = torch.tensor(starts, dtype=torch.int32, device="cpu")
        return _layout(chunk_offsets, sequence_chunks, chunk_offsets[sequence_chunks.long()], total, None)

    def __post_init__(self) -> None:
        """Check the tensors, as the planner does not; the values of a moved layout were checked on the CPU."""
        if not isinstance(self._host, (ChunkLayout, type(None))):
            raise TypeError(
                f"_host: got {type(self._host).__name__}, needs a ChunkLayout or None: move a layout with to"
            )
        for name in ("chunk_offsets", "sequence_chunks", "sequence_offsets"):
            tensor = getattr(self, name)
            check_dtype(name, tensor, torch.int32)
            if tensor.dim() != 1 or not tensor.shape[0] or not tensor.is_contiguous():
                raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs one dimension, contiguous, not empty")
            if self._host is None and tensor.device.type != "cpu":
                raise ValueError(f"{name}: got device {tensor.device}, needs cpu: move a layout with its method to")
            if self._host is not None:
                check_shape(name, tensor, *getattr(self._host, name).shape)
        object.__setattr__(self, "total_rows", as_int("total_rows", self.total_rows, 0))
        check_shape("sequence_offsets", self.sequence_offsets, *self.sequence_chunks.shape)
        if self._host is None:
            _check_offsets("chunk_offsets", self.chunk_offsets, 1, self.total_rows, "total_rows")
            _check_offsets("sequence_chunks", self.sequence_chunks, 0, self.num_chunks, "the number of chunks")
            if not torch.equal(self.sequence_offsets, self.chunk_offsets[self.sequence_chunks.long()]):
                raise ValueError(
                    f"sequence_offsets: got {self.sequence_offsets.tolist()}, needs the rows of chunk_offsets at which "
                    "the chunks of sequence_chunks start"
                )
        elif self.total_rows != self._host.total_rows:
            raise ValueError(f"total_rows: got {self.total_rows}, needs {self._host.total_rows}, as on the CPU")

    @property
    def num_chunks(self) -> int:
        """C, the number of chunks of the batch."""
        return self.chunk_offsets.shape[0] - 1

    @property
    def num_sequences(self) -> int:
        """B, the number of sequences."""
        return self.sequence_chunks.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.chunk_offsets.device

    def lengths(self) -> list[list[int]]:
        """Return the chunk lengths of each sequence: the argument of ``from_lengths``."""
        host = self.host()
        lengths = host.chunk_offsets.diff().tolist()
        starts = host.sequence_chunks.tolist()
        return [lengths[start:end] for start, end in zip(starts, starts[1:])]

    def host(self) -> ChunkLayout:
        """Return this layout on the CPU, without a copy from the device."""
        return self._host or self

    def to(self, device: torch.device | str) -> ChunkLayout:
        """Return this layout on ``device``."""
        host = self.host()
        if torch.device(device).type == "cpu":
            return host
        chunk_offsets, sequence_chunks, sequence_offsets = (
            t.to(device, non_blocking=True) for t in (host.chunk_offsets, host.sequence_chunks, host.sequence_offsets)
        )
        return _layout(chunk_offsets, sequence_chunks, sequence_offsets, self.total_rows, host)


def _layout(
    chunk_offsets: torch.Tensor,
    sequence_chunks: torch.Tensor,
    sequence_offsets: torch.Tensor,
    total_rows: int,
    host: ChunkLayout | None,
) -> ChunkLayout:
    return unchecked(
        ChunkLayout,
        chunk_offsets=chunk_offsets,
        sequence_chunks=sequence_chunks,
        sequence_offsets=sequence_offsets,
        total_rows=total_rows,
        _host=host,
    )


def _check_offsets(name: str, offsets: torch.Tensor, least: int, end: int, end_name: str) -> None:
    """Raise ValueError unless ``offsets`` go from 0 to ``end`` in steps of at least ``least``."""
    values = offsets.long()
    if values[0] != 0:
        raise ValueError(f"{name}: got {int(values[0])} at its start, needs 0")
    short = (values.diff() < least).nonzero()
    if len(short):
        at = int(short[0])
        raise ValueError(
            f"{name}: got {int(values[at + 1])} after {int(values[at])} at {at + 1}, needs steps of at least {least}"
        )
    if values[-1] != end:
        raise ValueError(f"{name}: got {int(values[-1])} at its end, needs {end}, {end_name}")


def _position(starts: list[int], chunk: int) -> tuple[int, int]:
    """Return the sequence of a chunk and its index within that sequence."""
    sequence = next(i for i, end in enumerate(starts[1:]) if chunk < end)
    return sequence, chunk - starts[sequence]


def _as_int(length: object, sequence: int, chunk: int) -> int:
    try:
        if isinstance(length, bool):
            raise TypeError
        return length.__index__()  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        raise TypeError(f"lengths: got {length!r} for chunk {chunk} of sequence {sequence}, needs an integer") from None
