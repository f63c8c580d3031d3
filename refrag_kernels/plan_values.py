"""Checks of plans assembled by hand: dtypes, shapes and devices, and on the CPU values too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from refrag_kernels import extension, tile_lists
from refrag_kernels.plan_fields import PlanSize
from refrag_kernels.validation import check_dtype, check_same_device, check_shape

# Fields whose number of rows is that of another field plus a constant.
_ROWS_OF = {
    "full_offsets": ("q_blocks", 1),
    "partial_offsets": ("q_blocks", 1),
    "partial_bits": ("partial_keys", 0),
    "full_t_offsets": ("kv_blocks", 1),
    "partial_t_offsets": ("kv_blocks", 1),
    "partial_t_tiles": ("partial_keys", 0),
}


def check(fields: Mapping[str, torch.Tensor], row_shapes: Sequence[tuple[int, ...]], tiles: object) -> None:
    """Raise TypeError or ValueError, naming the field, unless kernels stay within bounds when they follow the fields.

    Values are checked on the CPU only; those of ``tiles``, which are on a GPU, are not.
    """
    for (name, tensor), row_shape in zip(fields.items(), row_shapes):
        _check_section(name, tensor, row_shape)
    check_same_device(**fields)
    check_shape("sizes", fields["sizes"], len(PlanSize))
    for name, (other, more) in _ROWS_OF.items():
        rows, needed = fields[name].shape[0], fields[other].shape[0] + more
        if rows != needed:
            raise ValueError(f"{name}: got {rows} rows, needs {needed}, by the rows of {other}")
    if not isinstance(tiles, tuple):
        raise TypeError(f"tiles: got {type(tiles).__name__}, needs a tuple")
    if tiles and len(tiles) != len(tile_lists.ROW_SHAPES):
        raise ValueError(f"tiles: got {len(tiles)} tensors, needs none or {len(tile_lists.ROW_SHAPES)}")
    for number, (tensor, row_shape) in enumerate(zip(tiles, tile_lists.ROW_SHAPES)):
        _check_section(f"tiles[{number}]", tensor, row_shape)
        check_same_device(sizes=fields["sizes"], **{f"tiles[{number}]": tensor})
    # A subclass, such as a FakeTensor, may have no memory.
    if all(type(tensor) is torch.Tensor and tensor.device.type == "cpu" for tensor in fields.values()):
        extension.planner().check_plan(
            [tensor.data_ptr() for tensor in fields.values()], [tensor.shape[0] for tensor in fields.values()]
        )


def _check_section(name: str, tensor: torch.Tensor, row_shape: tuple[int, ...]) -> None:
    check_dtype(name, tensor, torch.int32)
    check_shape(name, tensor, "rows", *row_shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {list(tensor.stride())}, needs a contiguous tensor")
