"""How an op enters torch: schema, implementation, fake kernel, autograd and autocast, the same way for every op."""

from __future__ import annotations

from collections.abc import Callable

import torch

from refrag_kernels import backends
from refrag_kernels.validation import AUTOCAST_DEVICES, AUTOCAST_DTYPES

_LIBRARY = torch.library.Library("refrag", "DEF")

# The module of a backend's folder that implements each op.
FAMILY_OF_OP: dict[str, str] = {}


def register_op(
    schema: str,
    *,
    family: str,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: tuple[str, ...] = (),
) -> torch._ops.OpOverload:
    """Register ``refrag::<op>`` and return it.

    Parameters
    ----------
    schema : str
        The op's schema. Its last argument is the keyword-only ``str? backend``.
    family : str
        The module that implements the op in each backend's folder (see ``backends``).
    fake : callable
        The fake kernel: checks shapes and dtypes as the public function does, returns empty tensors.
    setup_context, backward : callable, optional
        As ``torch.library.register_autograd`` takes them. Without ``backward``, differentiating the op raises.
    autocast : tuple of str
        The tensor arguments that take part in autocast: cast to its dtype when they are float32, float16 or bfloat16.
    """
    name = schema[: schema.index("(")]
    FAMILY_OF_OP[name] = family
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.refrag, name).default
    names = [argument.name for argument in op._schema.arguments]

    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def implementation(*args, backend=None, **kwargs):
        device = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)).device
        result = backends.select(name, family, backend, device, args, kwargs)(*args, **kwargs)
        if written:
            # As torch.library.custom_op does: a backward pass that needs the old values finds that they are gone.
            torch.autograd.graph.increment_version([args[i] for i in written if not args[i].is_inference()])
        return result

    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"refrag::{name}", fake, lib=_LIBRARY)
    if not op._schema.is_mutable:
        torch.library.register_autograd(
            f"refrag::{name}", backward or _not_differentiable(name), setup_context=setup_context, lib=_LIBRARY
        )
    if autocast:
        positions = {names.index(argument) for argument in autocast}
        for device_type in AUTOCAST_DEVICES:
            _register_autocast(name, op, device_type, positions)
    return op


def _not_differentiable(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(f"refrag::{name} can't be differentiated")

    return backward


def _register_autocast(name: str, op: torch._ops.OpOverload, device_type: str, positions: set[int]) -> None:
    key = f"Autocast{device_type.upper()}"
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(value, dtype):
        eligible = isinstance(value, torch.Tensor) and value.dtype in AUTOCAST_DTYPES
        return value.to(dtype) if eligible and value.device.type == device_type else value

    def implementation(*args, **kwargs):
        dtype = torch.get_autocast_dtype(device_type)
        args = tuple(cast(a, dtype) if i in positions else a for i, a in enumerate(args))
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return op(*args, **kwargs)

    _LIBRARY.impl(name, implementation, key)
