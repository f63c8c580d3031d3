"""plan_attention: turns a layout and a mask into the tiles that the attention kernels of all backends iterate over."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

import torch

from refrag_kernels import extension, plan_values, pytree, tile_lists
from refrag_kernels.layout import ChunkLayout
from refrag_kernels.mask import ChunkMask, MaskKind
from refrag_kernels.plan_fields import PlanField, PlanSize
from refrag_kernels.validation import as_int, unchecked, window_bounds

TILE = 16  # rows of a query block and keys of a tile, as in csrc/planner/planner.h

# Each section of a plan starts at a multiple of 64 bytes: a cache line, and more than any vector load needs.
_ALIGNMENT = 16  # in int32 words


def _field(*shape: int):
    """Declare a field of the plan: the shape of its rows, in int32 words."""
    return dataclasses.field(metadata={"row_shape": shape})


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What attention kernels iterate over: made once per batch by ``plan_attention``, used by all layers and backward.

    The rows of each sequence are cut into blocks of 16 query rows and tiles of 16 key rows, counted from the sequence's
    first row. A pair of block and tile is skipped, full (every row attends to every key) or partial. All fields are
    int32 tensors on one device. Under a ``capacity`` they are longer than what is used, which ``sizes`` holds.

    Attributes
    ----------
    sizes : [8]
        T_q, T_kv, query blocks, key blocks, full ranges, partial tiles, transposed full ranges, sequences.
    q_row_block, kv_row_block : [T_q], [T_kv]
        The block of each packed row; -1 marks rows beyond the batch, under a capacity.
    q_blocks : [NB, 4]
        First query row, number of rows (1 to 16), first key row of its sequence, number of key rows of its sequence.
    full_offsets, full_ranges : [NB + 1], [F, 2]
        Key rows [start, end) that every row of a block attends to, whole tiles.
    partial_offsets, partial_keys, partial_bits : [NB + 1], [P], [P, 8]
        First key row of a partial tile; bit ``16 * (r % 2) + c`` of word ``r // 2``: row r of the block attends to key
        c of the tile. The bits combine mask, causality, window and the ends of the sequence.
    kv_blocks : [NK, 4]
        First key row, number of rows (1 to 16), first query row of its sequence, number of query rows of its sequence.
    full_t_offsets, full_t_ranges : [NK + 1], [FT, 2]
        The transpose, for the backward pass: query rows [start, end), whole blocks, that attend to every key of a tile.
    partial_t_offsets, partial_t_tiles : [NK + 1], [P, 2]
        Query block, and index into ``partial_keys`` and ``partial_bits``.
    tiles : tuple of Tensor
        The lists of ``refrag_kernels.tile_lists``, which GPU kernels iterate over; empty on the CPU.

    Raises
    ------
    TypeError, ValueError
        If a plan is assembled by hand (``dataclasses.replace``) from tensors whose dtypes, shapes or devices don't
        match or, on the CPU, whose values would make a kernel read out of bounds.
    """

    sizes: torch.Tensor = _field()
    q_row_block: torch.Tensor = _field()
    kv_row_block: torch.Tensor = _field()
    q_blocks: torch.Tensor = _field(4)
    full_offsets: torch.Tensor = _field()
    full_ranges: torch.Tensor = _field(2)
    partial_offsets: torch.Tensor = _field()
    partial_keys: torch.Tensor = _field()
    partial_bits: torch.Tensor = _field(8)
    kv_blocks: torch.Tensor = _field(4)
    full_t_offsets: torch.Tensor = _field()
    full_t_ranges: torch.Tensor = _field(2)
    partial_t_offsets: torch.Tensor = _field()
    partial_t_tiles: torch.Tensor = _field(2)
    tiles: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        """Check the tensors, and on the CPU their values: kernels follow them unchecked."""
        plan_values.check({name: getattr(self, name) for name in _FIELDS}, list(_FIELDS.values()), self.tiles)

    def tensors(self) -> list[torch.Tensor]:
        """Return the fields in the order in which ops take them."""
        return [*(getattr(self, name) for name in _FIELDS), *self.tiles]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.sizes.device

    def to(self, device: torch.device | str) -> AttentionPlan:
        """Return this plan on ``device``, moved by a single copy."""
        device = torch.device(device)
        if device == self.device:
            return self
        shapes = _shapes(self)
        buffer = _buffer_of(self)
        if tile_lists.wanted(device) and not self.tiles and self.device.type == "cpu":
            buffer, shapes = _with_tiles(buffer, shapes, _capacity_of(self), device)
        # A copy to the CPU must be complete before it is read, and nothing else would wait for it.
        return _from_buffer(buffer.to(device, non_blocking=device.type != "cpu"), shapes)

    def __reduce__(self) -> tuple:
        """Copy and pickle the buffer once: each field is a view and would bring all of it along."""
        return _from_buffer, (_buffer_of(self), _shapes(self))

    def stats(self) -> dict[str, int]:
        """Count the pairs and tiles of the plan. Synchronizes with the device: for inspection, not for hot paths.

        Returns
        -------
        dict
            ``pairs_allowed``: pairs of rows the mask allows. ``pairs_computed``: 256 for each tile that is not skipped.
            ``tiles_full``, ``tiles_partial``, ``tiles_skipped``: of all pairs of block and tile within a sequence.

        Examples
        --------
        >>> from refrag_kernels import ChunkLayout, plan_attention
        >>> plan_attention(ChunkLayout.from_lengths([[64]])).stats()
        {'pairs_allowed': 2080, 'pairs_computed': 2560, 'tiles_full': 6, 'tiles_partial': 4, 'tiles_skipped': 6}
        """
        plan = self.to("cpu")
        sizes = plan.sizes.tolist()
        blocks, full, partial = (sizes[n] for n in (PlanSize.Q_BLOCKS, PlanSize.FULL_RANGES, PlanSize.PARTIAL_TILES))
        rows = plan.q_blocks[:blocks, 1].long()
        ranges = plan.full_ranges[:full].long()
        running = torch.zeros(full + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(ranges[:, 1] - ranges[:, 0], 0, out=running[1:])
        per_block = running[plan.full_offsets[: blocks + 1].long()].diff()
        bits = plan.partial_bits[:partial].long()
        allowed = int((per_block * rows).sum()) + sum(int((bits >> shift & 1).sum()) for shift in range(32))
        tiles_full = int(per_block.sum()) // TILE
        tiles_all = int(((plan.q_blocks[:blocks, 3].long() + TILE - 1) // TILE).sum())
        return {
            "pairs_allowed": allowed,
            "pairs_computed": (tiles_full + partial) * TILE * TILE,
            "tiles_full": tiles_full,
            "tiles_partial": partial,
            "tiles_skipped": tiles_all - tiles_full - partial,
        }


_ROW_SHAPES = {field.name: field.metadata.get("row_shape", ()) for field in dataclasses.fields(AttentionPlan)}
_FIELDS = {field.name.lower(): _ROW_SHAPES[field.name.lower()] for field in PlanField}
pytree.register(AttentionPlan, serialized_type_name="refrag_kernels.AttentionPlan")


@dataclasses.dataclass(frozen=True)
class PlanCapacity:
    """Fixed sizes of a plan's buffers, so that a captured CUDA graph can replay on plans that are refilled.

    Attributes
    ----------
    q_rows, kv_rows : int
        Packed query and key rows.
    q_blocks, kv_blocks : int
        Blocks of 16 rows; each sequence rounds up by itself.
    full_ranges, partial_tiles, full_t_ranges : int
        Entries of the lists of the same names.

    Examples
    --------
    >>> from refrag_kernels import ChunkLayout, PlanCapacity, plan_attention
    >>> capacity = PlanCapacity.for_rows(512, sequences=4)
    >>> plan = plan_attention(ChunkLayout.from_lengths([[100, 1, 1, 40], [60]]), capacity=capacity)
    >>> plan.q_row_block.shape, plan.sizes[0].item()
    (torch.Size([512]), 202)
    >>> refilled = plan_attention(ChunkLayout.from_lengths([[300]]), capacity=capacity, out=plan)
    >>> refilled is plan, plan.sizes[0].item()
    (True, 300)
    """

    q_rows: int
    kv_rows: int
    q_blocks: int
    kv_blocks: int
    full_ranges: int
    partial_tiles: int
    full_t_ranges: int

    def __post_init__(self) -> None:
        """Check that all are counts."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, as_int(field.name, getattr(self, field.name), 0))

    @staticmethod
    def for_rows(q_rows: int, *, sequences: int, kv_rows: int | None = None, ranges_per_block: int = 4) -> PlanCapacity:
        """Return a capacity for batches of up to ``sequences`` sequences and ``q_rows`` query rows.

        ``ranges_per_block`` is the mean number of full ranges and of partial tiles of a block of 16 rows: 4 holds plain
        causal plans and passages that are not interleaved; a plan that does not fit is refused by ``plan_attention``.
        """
        q_rows, sequences = as_int("q_rows", q_rows, 0), as_int("sequences", sequences, 0)
        kv_rows = q_rows if kv_rows is None else as_int("kv_rows", kv_rows, 0)
        ranges_per_block = as_int("ranges_per_block", ranges_per_block, 0)
        q_blocks, kv_blocks = q_rows // TILE + sequences, kv_rows // TILE + sequences
        return PlanCapacity(
            q_rows,
            kv_rows,
            q_blocks,
            kv_blocks,
            full_ranges=ranges_per_block * q_blocks,
            partial_tiles=ranges_per_block * q_blocks,
            full_t_ranges=ranges_per_block * kv_blocks,
        )


def _rows_of_fields(
    q_rows: int, kv_rows: int, q_blocks: int, kv_blocks: int, full: int, partial: int, full_t: int
) -> list[int]:
    """Return the rows of each field, in the order of PlanField, from the values of a PlanCapacity."""
    rows = {
        PlanField.SIZES: len(PlanSize),
        PlanField.Q_ROW_BLOCK: q_rows,
        PlanField.KV_ROW_BLOCK: kv_rows,
        PlanField.Q_BLOCKS: q_blocks,
        PlanField.FULL_OFFSETS: q_blocks + 1,
        PlanField.FULL_RANGES: full,
        PlanField.PARTIAL_OFFSETS: q_blocks + 1,
        PlanField.PARTIAL_KEYS: partial,
        PlanField.PARTIAL_BITS: partial,
        PlanField.KV_BLOCKS: kv_blocks,
        PlanField.FULL_T_OFFSETS: kv_blocks + 1,
        PlanField.FULL_T_RANGES: full_t,
        PlanField.PARTIAL_T_OFFSETS: kv_blocks + 1,
        PlanField.PARTIAL_T_TILES: partial,
    }
    return [rows[field] for field in PlanField]


_FULL = ChunkMask.full()


def plan_attention(
    layout: ChunkLayout,
    mask: ChunkMask | None = None,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    kv_layout: ChunkLayout | None = None,
    capacity: PlanCapacity | None = None,
    out: AttentionPlan | None = None,
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """Plan the attention of a batch: which tiles of rows and keys have to be computed, and which pairs of a tile count.

    With i and j the row numbers within one sequence, query row i attends to key row j iff ``mask[chunk(i), chunk(j)]``
    and (not causal or j <= i) and the window holds.

    Parameters
    ----------
    layout : ChunkLayout
        Chunks of the query rows; with ``kv_layout`` only the number of rows of each of its sequences counts.
    mask : ChunkMask, optional
        Default ``ChunkMask.full()``.
    causal : bool
        Whether rows attend only to themselves and earlier rows.
    window : int or (int, int), optional
        An int w allows j > i - w and needs ``causal``. A pair (left, right) allows i - left <= j <= i + right; -1 means
        no bound.
    kv_layout : ChunkLayout, optional
        Chunks of the key rows, where they are more than the query rows (append, multi-turn, chunked prefill): the query
        rows are the last rows of each of its sequences. The mask is about its chunks; i and j count from its first row.
    capacity : PlanCapacity, optional
        Fixed sizes of the plan's buffers.
    out : AttentionPlan, optional
        A plan made with the same ``capacity``, to be refilled in place by one copy that doesn't wait for the device.
    device : torch.device or str, optional
        Where the plan goes; default where ``out`` is, or else ``layout``.

    Returns
    -------
    AttentionPlan

    Raises
    ------
    TypeError, ValueError
        If mask, layouts, window and capacity have other types or don't match; the message names the argument.

    Examples
    --------
    >>> from refrag_kernels import ChunkLayout, ChunkMask, plan_attention
    >>> layout = ChunkLayout.from_lengths([[64, 1, 1, 16, 1, 32]])
    >>> plan_attention(layout).stats()["pairs_allowed"] == 115 * 116 // 2
    True
    >>> plan_attention(layout, ChunkMask.diagonal(), causal=False).stats()["pairs_allowed"]
    5379
    """
    if not isinstance(layout, ChunkLayout):
        raise TypeError(f"layout: got {type(layout).__name__}, needs a ChunkLayout")
    for name, value, wanted in (
        ("kv_layout", kv_layout, ChunkLayout),
        ("capacity", capacity, PlanCapacity),
        ("out", out, AttentionPlan),
    ):
        if value is not None and not isinstance(value, wanted):
            raise TypeError(f"{name}: got {type(value).__name__}, needs {wanted.__name__} or None")
    if out is not None and capacity is None:
        raise ValueError("out: needs the capacity that it was made with")
    if device is None:
        device = layout.device if out is None else out.device
    device = torch.device(device)
    left, right = window_bounds(window, causal)
    keys = (layout if kv_layout is None else kv_layout).host()
    query_lengths = None if kv_layout is None else _query_lengths(layout.host(), keys)
    built = extension.planner().plan(
        *_problem(keys, _FULL if mask is None else mask),
        0 if query_lengths is None else query_lengths.data_ptr(),
        left,
        right,
    )
    rows = _rows(built.sizes()) if capacity is None else _capacity_rows(built.sizes(), capacity)
    shapes = [(count, *row_shape) for count, row_shape in zip(rows, _FIELDS.values())]
    offsets, total = _offsets(shapes)
    buffer = _empty_buffer(total, device)
    built.write(buffer.data_ptr(), offsets, rows)
    if tile_lists.wanted(device):
        buffer, shapes = _with_tiles(buffer, shapes, capacity, device)
    if out is not None:
        if out.device.type != device.type:
            raise ValueError(f"out: got a plan on {out.device}, needs one on {device}")
        if _shapes(out) != shapes:
            raise ValueError("out: got a plan of another capacity, needs one made with this capacity")
        if "_buffer" in vars(out):
            _buffer_of(out).copy_(buffer, non_blocking=True)
        else:
            for tensor, section in zip(out.tensors(), _views(buffer, shapes)):
                tensor.copy_(section, non_blocking=True)
        return out
    return _from_buffer(buffer.to(device, non_blocking=True), shapes)


def _problem(keys: ChunkLayout, mask: ChunkMask) -> tuple[int, ...]:
    """Return a layout on the CPU and a mask as arguments for the planner."""
    if not isinstance(mask, ChunkMask):
        raise TypeError(f"mask: got {type(mask).__name__}, needs a ChunkMask")
    for name, tensor, want in (
        ("passage_of_chunk", mask.passage_of_chunk, keys.num_chunks),
        ("indptr", mask.indptr, keys.num_chunks + 1),
    ):
        if tensor is not None and tensor.shape[0] != want:
            raise ValueError(
                f"mask: got {tensor.shape[0]} entries in {name}, needs {want} for a layout of {keys.num_chunks} chunks"
            )
    address = [0 if t is None else t.data_ptr() for t in (mask.passage_of_chunk, mask.indptr, mask.indices)]
    return (
        keys.chunk_offsets.data_ptr(),
        keys.num_chunks,
        keys.sequence_chunks.data_ptr(),
        keys.num_sequences,
        int(mask.kind),
        *address,
        mask.indices.shape[0] if mask.kind == MaskKind.CSR and mask.indices is not None else 0,
    )


def _query_lengths(layout: ChunkLayout, keys: ChunkLayout) -> torch.Tensor:
    """Return the number of query rows of each sequence; raise ValueError if one has fewer keys than that."""
    if layout.num_sequences != keys.num_sequences:
        raise ValueError(
            f"kv_layout: got {keys.num_sequences} sequences, needs {layout.num_sequences}, as many as layout has"
        )
    lengths, key_lengths = layout.sequence_offsets.diff(), keys.sequence_offsets.diff()
    if bool((lengths > key_lengths).any()):
        sequence = int((lengths > key_lengths).nonzero()[0])
        raise ValueError(
            f"kv_layout: got {int(key_lengths[sequence])} rows in sequence {sequence}, "
            f"needs at least the {int(lengths[sequence])} of layout"
        )
    return lengths


def _rows(sizes: Sequence[int]) -> list[int]:
    # Lists never have 0 or 1 rows: torch.compile would specialize on these sizes.
    lists = {size: max(2, sizes[size]) for size in PlanSize}
    return _rows_of_fields(
        sizes[PlanSize.Q_ROWS],
        sizes[PlanSize.KV_ROWS],
        lists[PlanSize.Q_BLOCKS],
        lists[PlanSize.KV_BLOCKS],
        lists[PlanSize.FULL_RANGES],
        lists[PlanSize.PARTIAL_TILES],
        lists[PlanSize.FULL_T_RANGES],
    )


def _capacity_rows(sizes: Sequence[int], capacity: PlanCapacity) -> list[int]:
    for field in dataclasses.fields(capacity):
        needed = sizes[PlanSize[field.name.upper()]]
        if getattr(capacity, field.name) < needed:
            raise ValueError(
                f"capacity: got {field.name}={getattr(capacity, field.name)}, needs at least {needed} for this batch"
            )
    return _rows_of_fields(*dataclasses.astuple(capacity))


def _offsets(shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], int]:
    """Return the start of each section of a plan in its buffer, and the buffer's length, in words."""
    offsets, total = [], 0
    for shape in shapes:
        offsets.append(total)
        total += -(-torch.Size(shape).numel() // _ALIGNMENT) * _ALIGNMENT
    return offsets, total


def _empty_buffer(words: int, device: torch.device) -> torch.Tensor:
    """Return a buffer on the CPU that can be copied to ``device`` asynchronously."""
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return torch.empty(words, dtype=torch.int32, device="cpu", pin_memory=pinned)


def _with_tiles(
    buffer: torch.Tensor, shapes: list[tuple[int, ...]], capacity: PlanCapacity | None, device: torch.device
) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Return the buffer of a plan on the CPU, and its shapes, with tile lists appended."""
    lists = tile_lists.derive(_views(buffer, shapes), split=capacity is None)
    if capacity is None:
        rows = tile_lists.sizes(lists)
    else:
        rows = tile_lists.capacity(
            capacity.q_blocks,
            capacity.kv_blocks,
            capacity.full_ranges,
            capacity.partial_tiles,
            capacity.full_t_ranges,
        )
    shapes = [*shapes, *((count, *shape) for count, shape in zip(rows, tile_lists.ROW_SHAPES))]
    offsets, total = _offsets(shapes)
    whole = _empty_buffer(total, device)
    # torch's copy would wake its thread pool, which takes longer than planning.
    ctypes.memmove(whole.data_ptr(), buffer.data_ptr(), buffer.nbytes)
    tile_lists.write(lists, whole.data_ptr(), offsets[len(_FIELDS) :], rows)
    return whole, shapes


def _from_buffer(buffer: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> AttentionPlan:
    views = _views(buffer, shapes)
    fields = dict(zip(_FIELDS, views))
    # Not a field, so dataclasses and pytrees ignore it: one copy of the buffer moves or refills the plan.
    return unchecked(AttentionPlan, **fields, tiles=tuple(views[len(_FIELDS) :]), _buffer=buffer)


def _views(buffer: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    offsets, _ = _offsets(shapes)
    return [buffer[offset : offset + torch.Size(shape).numel()].view(shape) for offset, shape in zip(offsets, shapes)]


def _shapes(plan: AttentionPlan) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in plan.tensors()]


def _buffer_of(plan: AttentionPlan) -> torch.Tensor:
    """Return the buffer that the plan's fields are views of, or copy the fields into a new one."""
    buffer = vars(plan).get("_buffer")
    if buffer is None:  # assembled by hand, or from leaves of a pytree
        shapes = _shapes(plan)
        buffer = torch.zeros(_offsets(shapes)[1], dtype=torch.int32, device=plan.device)
        for section, tensor in zip(_views(buffer, shapes), plan.tensors()):
            section.copy_(tensor)
    return buffer


def _capacity_of(plan: AttentionPlan) -> PlanCapacity | None:
    """Return the capacity of a plan on the CPU, from its shapes; None if they equal its sizes."""
    rows = _rows(plan.sizes.tolist())
    given = [tensor.shape[0] for tensor in plan.tensors()[: len(_FIELDS)]]
    if rows == given:
        return None
    return PlanCapacity(
        q_rows=given[PlanField.Q_ROW_BLOCK],
        kv_rows=given[PlanField.KV_ROW_BLOCK],
        q_blocks=given[PlanField.Q_BLOCKS],
        kv_blocks=given[PlanField.KV_BLOCKS],
        full_ranges=given[PlanField.FULL_RANGES],
        partial_tiles=given[PlanField.PARTIAL_KEYS],
        full_t_ranges=given[PlanField.FULL_T_RANGES],
    )
