"""The keys and values that a decoder keeps of a passage: all rows, or of each chunk some.

An extension of the paper, whose slots are embeddings. Here, a chunk's slots are some of the rows that the decoder
itself computed when it read the passage; each layer and each key/value head keeps rows of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

RULES = ("received", "distinct")


class MissingRowsError(ValueError):
    """Raised if a chunk is to stand whole, but only some of its rows are held."""


@dataclasses.dataclass(frozen=True)
class SlotRule:
    """Which rows of a passage its slots keep.

    Attributes
    ----------
    rows : int
        m, the number of rows of a chunk; a chunk of fewer tokens keeps all of them.
    rule : {"received", "distinct"}
        "received" keeps the rows that received most attention from the passage's own rows. "distinct" keeps those whose
        keys, without their rotation, are least similar to the mean of their chunk's.
    whole : int
        Number of chunks at the end of each passage that keep all their rows.

    Raises
    ------
    ValueError
        If a field is invalid; names it.

    Examples
    --------
    >>> SlotRule(rows=2, whole=1).keep([8, 8, 8, 3])
    (2, 2, 2, 3)
    >>> SlotRule(rows=2).keep([8, 1])
    (2, 1)
    """

    rows: int = 1
    rule: str = "received"
    whole: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"rows: got {self.rows!r}, needs an integer of 1 or more")
        if self.rule not in RULES:
            raise ValueError(f"rule: got {self.rule!r}, needs one of {', '.join(RULES)}")
        if not isinstance(self.whole, int) or self.whole < 0:
            raise ValueError(f"whole: got {self.whole!r}, needs an integer of 0 or more")

    def __str__(self) -> str:
        whole = f", the last {self.whole} of a passage whole" if self.whole else ""
        return f"{self.rows} {'row' if self.rows == 1 else 'rows'} of each chunk, the most {self.rule}{whole}"

    def keep(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return the number of rows that each chunk of a passage keeps, given the chunks' numbers of tokens."""
        compressed = len(lengths) - self.whole
        return tuple(min(self.rows, length) if i < compressed else length for i, length in enumerate(lengths))


@dataclasses.dataclass(frozen=True)
class PassageRows:
    """Keys and values of a passage in L layers of H key/value heads.

    Attributes
    ----------
    keys, values : Tensor [L, H, n, D]
        The rows of the chunks, in order. Keys have the rotation of their tokens' positions.
    rows : Tensor, int32 [L, H, n]
        Index of each row's token in the passage.
    lengths : tuple of int
        Number of tokens of each chunk.
    keep : tuple of int
        Number of rows of each chunk, whose sum is n.
    start : int
        Position of the passage's first token, which is the number of rows of shared text before it.
    key_scale, value_scale : Tensor [L, H, n], float32, optional
        Factors of the rows of float8 keys and values.

    Raises
    ------
    ValueError
        If the shapes don't match each other or the numbers of rows.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    lengths: tuple[int, ...]
    keep: tuple[int, ...]
    start: int
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        needed = [*self.keys.shape[:2], sum(self.keep)]
        if self.keys.dim() != 4 or list(self.keys.shape[:3]) != needed or len(self.keep) != len(self.lengths):
            raise ValueError(
                f"keys: got shape {list(self.keys.shape)}, needs [L, H, {sum(self.keep)}, D], the rows of "
                f"{len(self.lengths)} chunks"
            )
        for name in ("values", "rows", "key_scale", "value_scale"):
            tensor, shape = getattr(self, name), list(self.keys.shape) if name == "values" else needed
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs {shape}, as the keys have")

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        tensors = (self.keys, self.values, self.rows, self.key_scale, self.value_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PassageRows:
        """Return the rows on a device, with keys and values in this dtype; float8 (e4m3) gets scales, others none."""
        keys, key_scale = _converted(self.keys, self.key_scale, device, dtype)
        values, value_scale = _converted(self.values, self.value_scale, device, dtype)
        rows = self.rows.to(device)
        return dataclasses.replace(
            self, keys=keys, values=values, rows=rows, key_scale=key_scale, value_scale=value_scale
        )

    def finite_in(self, dtype: torch.dtype) -> bool:
        """Return whether all keys and values are finite in a dtype."""
        wide = torch.float32 if dtype == torch.float8_e4m3fn else dtype  # whose scales fit it
        plain = self if self.key_scale is None else self.to(self.keys.device, wide)
        return all(bool(states.to(wide).isfinite().all()) for states in (plain.keys, plain.values))


def _converted(
    states: torch.Tensor, scale: torch.Tensor | None, device: torch.device | str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return keys or values on a device in a dtype, and their scales."""
    if states.dtype == dtype:
        return states.to(device), None if scale is None else scale.to(device)
    states = states.to(device)
    if scale is not None:
        states = states.float() * scale.to(device)[..., None]
    if dtype != torch.float8_e4m3fn:
        return states.to(dtype), None
    # The largest element of a row becomes the largest number of float8; a row of zeros stays one.
    scale = states.abs().amax(-1).float() / torch.finfo(dtype).max
    scale = torch.where(scale > 0, scale, 1)
    return (states / scale[..., None]).to(dtype), scale


def all_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    lengths: Sequence[int],
    start: int,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> PassageRows:
    """Return the PassageRows of keys and values [L, H, T, D] of all T tokens of a passage."""
    rows = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device).expand(*keys.shape[:2], -1)
    return PassageRows(keys, values, rows, tuple(lengths), tuple(lengths), start, key_scale, value_scale)


@dataclasses.dataclass(frozen=True)
class PassageEntry:
    """What a cache or a store holds of a passage.

    Attributes
    ----------
    slots : PassageRows
    full : PassageRows, optional
        All rows, so that any chunk can be put back whole.
    """

    slots: PassageRows
    full: PassageRows | None = None

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return self.slots.nbytes + (0 if self.full is None else self.full.nbytes)

    def require(self, lengths: Sequence[int], keep: Sequence[int]) -> None:
        """Refuse a request that these rows can't answer; see ``take``.

        Raises
        ------
        ValueError
            If the passage has other chunks, or a chunk is to keep a number of rows that isn't held.
        MissingRowsError
            If a chunk is to stand whole and its full rows aren't held.
        """
        slots = self.slots
        if tuple(lengths) != slots.lengths:
            raise ValueError(f"chunks: got {list(lengths)} tokens, needs {list(slots.lengths)}, as it was read")
        for chunk, (wanted, held) in enumerate(zip(keep, slots.keep, strict=True)):
            if wanted == held:
                continue
            if wanted != lengths[chunk]:
                raise ValueError(
                    f"keep: got {wanted} rows of chunk {chunk}, needs the {held} that are held, or all {lengths[chunk]}"
                )
            if self.full is None:
                raise MissingRowsError(
                    f"keep: got all {wanted} rows of chunk {chunk}, of which only {held} are held, without full rows"
                )

    def take(self, keep: Sequence[int]) -> PassageRows:
        """Return the passage with some of its chunks put back whole.

        Parameters
        ----------
        keep : sequence of int
            Number of rows of each chunk: those held in ``slots``, or all of them.

        Raises
        ------
        ValueError, MissingRowsError
            As ``require``.
        """
        slots, full = self.slots, self.full
        self.require(slots.lengths, keep)
        if tuple(keep) == slots.keep or full is None:
            return slots
        picked: list[int] = []  # rows of the slots, then of the full passage
        slot, token, held = 0, sum(slots.keep), slots.keep
        for chunk, length in enumerate(slots.lengths):
            first, rows = (slot, held[chunk]) if keep[chunk] == held[chunk] else (token, length)
            picked += range(first, first + rows)
            slot, token = slot + held[chunk], token + length
        index = torch.tensor(picked, device=slots.keys.device)

        def gathered(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            if mine.dtype == torch.float8_e4m3fn:  # which torch moves only as bytes
                return gathered(mine.view(torch.uint8), theirs.view(torch.uint8)).view(mine.dtype)
            return torch.cat([mine, theirs], dim=2).index_select(2, index)

        tensors: dict[str, Any] = {
            name: gathered(getattr(slots, name), getattr(full, name))
            for name in ("keys", "values", "rows", "key_scale", "value_scale")
            if getattr(slots, name) is not None
        }
        return dataclasses.replace(slots, keep=tuple(keep), **tensors)
