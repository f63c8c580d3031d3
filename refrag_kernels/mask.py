"""ChunkMask: which chunk may attend to which chunk."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import torch

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class MaskKind(enum.IntEnum):
    """How a mask is represented; the numbers are the planner's."""

    FULL = 0
    PASSAGES = 1
    DIAGONAL = 2
    CSR = 3


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkMask:
    """Which chunk may attend to which chunk, without a dense rows x rows tensor.

    Create one with ``full``, ``passages``, ``diagonal``, ``from_dense`` or ``from_csr``. Causality and windows are not
    part of a mask but arguments of ``plan_attention``; a pair of rows is allowed only where all of them allow it.

    Attributes
    ----------
    kind : MaskKind
        Determines which of the tensors are set.
    passage_of_chunk : Tensor, int32 [C]
        Set for ``passages`` only.
    indptr, indices : Tensor, int32 [C + 1], [nnz]
        Set for ``from_csr`` and ``from_dense`` only.

    Examples
    --------
    >>> from refrag_kernels import ChunkLayout, ChunkMask, plan_attention
    >>> layout = ChunkLayout.from_lengths([[2, 3, 3, 2]])  # instruction, two passages, question
    >>> plan = plan_attention(layout, ChunkMask.passages([-1, 0, 1, -1]))
    >>> plan.stats()["pairs_allowed"]  # of 55 pairs under a plain causal mask
    46
    """

    kind: MaskKind
    passage_of_chunk: torch.Tensor | None = None
    indptr: torch.Tensor | None = None
    indices: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the mask has the tensors of its kind, and make them contiguous int32 on the CPU."""
        if not isinstance(self.kind, MaskKind):
            raise TypeError(f"kind: got {self.kind!r}, needs a MaskKind")
        needed = _TENSORS_OF_KIND.get(self.kind, ())
        for name in ("passage_of_chunk", "indptr", "indices"):
            values = getattr(self, name)
            if values is None:
                if name in needed:
                    raise ValueError(f"{name}: got None, which a mask of kind {self.kind.name} needs")
            elif name not in needed:
                raise ValueError(f"{name}: got values, needs None in a mask of kind {self.kind.name}")
            else:
                object.__setattr__(self, name, _integers(name, values))
        passages = self.passage_of_chunk
        if passages is not None and passages.numel() and int(passages.min()) < -1:
            chunk = int((passages < -1).nonzero()[0])
            raise ValueError(f"passage_of_chunk: got {int(passages[chunk])} for chunk {chunk}, needs -1 or more")

    @staticmethod
    def full() -> ChunkMask:
        """Every chunk attends to every chunk of its own sequence; with ``causal=True`` this is the paper's decoder."""
        return ChunkMask(MaskKind.FULL)

    @staticmethod
    def diagonal() -> ChunkMask:
        """A chunk attends only to itself: the chunk encoder's mask (REFRAG, section 2)."""
        return ChunkMask(MaskKind.DIAGONAL)

    @staticmethod
    def passages(passage_of_chunk: torch.Tensor | Sequence[int]) -> ChunkMask:
        """A chunk of a passage attends to shared text and its own passage; shared text attends to everything.

        This is the pattern of Block-Attention (arXiv 2409.15355), an extension: REFRAG's own decoder is plain causal.

        Parameters
        ----------
        passage_of_chunk : integer tensor [C] or sequence of int
            The passage of each chunk, counted per sequence; -1 marks shared text.

        Raises
        ------
        TypeError
            If the values are not integers.
        ValueError
            If it is not one-dimensional or an id is below -1.
        """
        return ChunkMask(MaskKind.PASSAGES, passage_of_chunk=passage_of_chunk)  # type: ignore[arg-type]

    @staticmethod
    def from_dense(allowed: torch.Tensor | Sequence[torch.Tensor]) -> ChunkMask:
        """Create a mask from bool matrices.

        Parameters
        ----------
        allowed : bool tensor [C, C], or one [c, c] per sequence
            ``allowed[a, b]``: chunk a may attend to chunk b. A row may be all False.

        Raises
        ------
        TypeError, ValueError
            If a matrix is not bool or not square. A pair from two sequences is refused when the plan is made.
        """
        if not isinstance(allowed, (torch.Tensor, Sequence)):
            raise TypeError(f"allowed: got {type(allowed).__name__}, needs a bool tensor or one per sequence")
        matrices = [allowed] if isinstance(allowed, torch.Tensor) else list(allowed)
        counts, indices, first = [], [], 0
        for i, matrix in enumerate(matrices):
            name = "allowed" if isinstance(allowed, torch.Tensor) else f"allowed[{i}]"
            if not isinstance(matrix, torch.Tensor) or matrix.dtype != torch.bool:
                raise TypeError(f"{name}: got {getattr(matrix, 'dtype', type(matrix).__name__)}, needs a bool tensor")
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"{name}: got shape {list(matrix.shape)}, needs a square matrix")
            if matrix.is_meta:
                raise ValueError(f"{name}: got a meta tensor, needs one with values")
            matrix = matrix.cpu()
            counts.append(matrix.sum(1))
            indices.append(matrix.nonzero()[:, 1] + first)
            first += matrix.shape[0]
        indptr = torch.zeros(first + 1, dtype=torch.int64, device="cpu")
        if counts:
            torch.cumsum(torch.cat(counts), 0, out=indptr[1:])
        return ChunkMask.from_csr(indptr, torch.cat(indices) if indices else [])

    @staticmethod
    def from_csr(indptr: torch.Tensor | Sequence[int], indices: torch.Tensor | Sequence[int]) -> ChunkMask:
        """Create a mask from compressed sparse rows (CSR).

        Parameters
        ----------
        indptr : integer tensor [C + 1]
            Where each chunk's list starts in ``indices``.
        indices : integer tensor [nnz]
            The chunks of the batch that each chunk may attend to, ascending.

        Raises
        ------
        TypeError
            If the values are not integers.
        ValueError
            When the plan is made: if an index is out of range, not ascending, or from another sequence.
        """
        return ChunkMask(MaskKind.CSR, indptr=indptr, indices=indices)  # type: ignore[arg-type]


_TENSORS_OF_KIND = {MaskKind.PASSAGES: ("passage_of_chunk",), MaskKind.CSR: ("indptr", "indices")}


def _integers(name: str, values: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Return ``values`` as a contiguous int32 tensor on the CPU."""
    if isinstance(values, torch.Tensor):
        tensor = values
    else:
        try:
            # The device is explicit, as torch.set_default_device may have set another one.
            tensor = torch.tensor(values, dtype=None if len(values) else torch.int32, device="cpu")
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: got {type(values).__name__}, needs integers ({error})") from None
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got dtype {str(tensor.dtype).removeprefix('torch.')}, needs integers")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs one dimension")
    if tensor.is_meta:
        raise ValueError(f"{name}: got a meta tensor, needs one with values")
    tensor = tensor.cpu()
    if tensor.dtype == torch.int64 and tensor.numel() and (int(tensor.max()) >= 2**31 or int(tensor.min()) < -(2**31)):
        raise ValueError(f"{name}: got values beyond int32")
    return tensor.to(torch.int32).contiguous()
