"""Which backend implements which op for which arguments: one row per backend and op.

The rows of an op are declared where it is registered, in order of preference. A row says which arguments the backend's
kernels support, which backend it falls back to instead of kernels of its own, or why it has no implementation.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence

import torch

from refrag_kernels.plan_fields import PlanField
from refrag_kernels.tile_lists import ROW_SHAPES
from refrag_kernels.validation import FLOAT_DTYPES

HALF = (torch.bfloat16, torch.float16)
SINGLE_AND_HALF = (torch.float32, *HALF)
TENSOR_CORES = (8, 0)  # the first compute capability whose mma.sync supports bfloat16
ALIGNMENT = 16  # bytes: of a vector load and of cp.async


@dataclasses.dataclass(frozen=True)
class Support:
    """The arguments that one backend's implementation of one op supports.

    Attributes
    ----------
    backend : str
    dtypes : tuple of torch.dtype
        Dtypes of the op's ``dtype_of`` argument.
    head_dims : tuple of int, optional
        Head dimensions of the op's argument ``q``; None: all.
    capability : (int, int), optional
        The oldest CUDA compute capability.
    aligned : tuple of str
        Arguments whose rows must start at multiples of ``ALIGNMENT`` bytes.
    exact_matmul : bool
        Whether torch's own matrix products are used: float32 is refused while torch computes it in one pass of TF32.
    tile_lists : bool
        Whether the argument ``plan`` must have tile lists.
    binds : bool
        Whether the op of the same name in ``_C`` is called directly, rather than a function in the backend's folder.
    fallback : str, optional
        The backend whose function runs instead of one of its own.
    missing : str, optional
        Why there is no implementation.
    """

    backend: str
    dtypes: tuple[torch.dtype, ...] = SINGLE_AND_HALF
    head_dims: tuple[int, ...] | None = None
    capability: tuple[int, int] | None = None
    aligned: tuple[str, ...] = ()
    exact_matmul: bool = False
    tile_lists: bool = False
    binds: bool = False
    fallback: str | None = None
    missing: str | None = None


# The specification supports every dtype and device.
REFERENCE = Support("reference", FLOAT_DTYPES)


class Implementation:
    """A row of an op's table: says why it refuses arguments, and loads its function on first use.

    Attributes
    ----------
    op : str
    support : Support
    module : str
        The function's module, unless an op of ``_C`` is called directly or there is no implementation.
    """

    def __init__(self, op: str, support: Support, module: str, names: Sequence[str], dtype_of: str) -> None:
        self.op, self.support, self.module = op, support, module
        self.backend = support.backend
        self._dtypes = support.dtypes
        self._dtype_at = names.index(dtype_of)
        self._q_at = names.index("q") if support.head_dims else None
        self._plan_at = names.index("plan") if support.tile_lists else None
        self._aligned = {name: names.index(name) for name in support.aligned}
        self._dtype_decides = not (support.head_dims or support.capability or support.aligned)
        self._dtype_decides &= not (support.exact_matmul or support.tile_lists)

    @functools.cached_property
    def function(self) -> Callable:
        """The function that computes the op."""
        if self.support.binds:
            return getattr(getattr(torch.ops, f"refrag_{self.backend}"), self.op).default
        return getattr(importlib.import_module(self.module), self.op)

    def unsupported(self, args: Sequence) -> str | None:
        """Return why the implementation does not support these arguments of the op, or None."""
        dtype = args[self._dtype_at].dtype
        if dtype not in self._dtypes:
            return f"dtype {str(dtype).removeprefix('torch.')}"
        if self._dtype_decides:
            return None
        support = self.support
        if support.exact_matmul and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            return "torch multiplies float32 in a single pass of TF32 (torch.set_float32_matmul_precision)"
        if self._plan_at is not None and len(args[self._plan_at]) != len(PlanField) + len(ROW_SHAPES):
            return "a plan without tile lists; make it with device='cuda' or move it there with .to"
        if self._q_at is not None and args[self._q_at].shape[-1] not in (support.head_dims or ()):
            return f"head_dim {args[self._q_at].shape[-1]}"
        if support.capability is not None and (reason := too_old(args[0].device, support.capability)):
            return reason
        return unaligned(**{name: args[at] for name, at in self._aligned.items()})


@dataclasses.dataclass(frozen=True)
class Op:
    """A registered op, ``refrag::<name>``.

    Attributes
    ----------
    name : str
    family : str
        The module that implements it in each backend's folder.
    implementations : dict of str to Implementation
        By backend, in order of preference. Every backend has one.
    """

    name: str
    family: str
    implementations: dict[str, Implementation]

    @property
    def is_backward(self) -> bool:
        """Whether the op computes the gradients of another op and is not called by users."""
        return self.name.endswith("_backward")


# All ops by name, filled by ``registration.register_op``.
OPS: dict[str, Op] = {}


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def too_old(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Refuse CUDA devices below a compute capability."""
    if device.type == "cuda" and _capability(device) < capability:
        return "a device older than sm_{}{}".format(*capability)
    return None


def unaligned(**tensors: torch.Tensor) -> str | None:
    """Refuse tensors with rows that don't start at multiples of ``ALIGNMENT`` bytes."""
    for name, tensor in tensors.items():
        elements = ALIGNMENT // tensor.element_size()
        strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        if tensor.data_ptr() % ALIGNMENT or any(size > 1 and stride % elements for size, stride in strides):
            return f"{name} has rows that don't start at multiples of {ALIGNMENT} bytes"
    return None
