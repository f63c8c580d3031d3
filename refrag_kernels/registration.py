"""Register ops with torch, all in the same way: schema, implementations, fake kernel, autograd and autocast."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from refrag_kernels.selection import BACKENDS, select
from refrag_kernels.support import OPS, Implementation, Op, Support
from refrag_kernels.validation import AUTOCAST_DEVICES, AUTOCAST_DTYPES

_LIBRARY = torch.library.Library("refrag", "DEF")


def register_op(
    schema: str,
    *,
    family: str,
    support: Sequence[Support],
    fake: Callable,
    values: Callable[..., None] | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: tuple[str, ...] = (),
    dtype_of: str | None = None,
) -> torch._ops.OpOverload:
    """Register ``refrag::<op>`` and return it.

    Parameters
    ----------
    schema : str
        The op's schema; its last argument is the keyword-only ``str? backend``.
    family : str
        The module that implements the op in each backend's folder (see ``selection``).
    support : sequence of Support
        One row for each backend, in order of preference.
    fake : callable
        The fake kernel: checks shapes and dtypes like the public function, and returns empty tensors.
    values : callable, optional
        Raises an error that names an argument with invalid values. It takes the op's arguments, with integer tensors on
        the CPU; see ``selection.Backend.values`` for when it runs.
    setup_context, backward : callable, optional
        See ``torch.library.register_autograd``. Without ``backward``, differentiating the op raises.
    autocast : tuple of str
        The tensor arguments that autocast casts if they are float32, float16 or bfloat16.
    dtype_of : str, optional
        The argument whose dtype the rows of ``support`` restrict; the first one by default.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.refrag, name).default
    names = [argument.name for argument in overload._schema.arguments]
    op = OPS[name] = Op(name, family, _implementations(name, family, support, names, dtype_of or names[0]))

    aliases = [argument.alias_info for argument in overload._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def implementation(*args, backend=None):
        chosen = select(op, backend, args)
        return chosen.function(*args) if values is None else _run_with_values(chosen, values, args)

    def writing(*args, backend=None):
        with torch.no_grad():  # a written tensor gets values without their history, whatever the backend writes with
            result = implementation(*args, backend=backend)
        # As torch.library.custom_op does, so that a backward pass that needs the old values raises.
        torch.autograd.graph.increment_version([args[i] for i in written if not args[i].is_inference()])
        return result

    _LIBRARY.impl(name, writing if written else implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"refrag::{name}", fake, lib=_LIBRARY)
    if not overload._schema.is_mutable:
        torch.library.register_autograd(
            f"refrag::{name}", backward or _not_differentiable(name), setup_context=setup_context, lib=_LIBRARY
        )
    if autocast:
        positions = {names.index(argument) for argument in autocast}
        for device_type in AUTOCAST_DEVICES:
            _register_autocast(name, overload, device_type, positions)
    return overload


def _implementations(
    op: str, family: str, support: Sequence[Support], names: Sequence[str], dtype_of: str
) -> dict[str, Implementation]:
    """Return the op's implementations by backend; a row with a fallback has the function of that backend."""
    rows = {row.backend: row for row in support}
    if len(rows) != len(support) or set(rows) != set(BACKENDS):
        raise ValueError(
            f"support of refrag::{op}: got rows for {', '.join(row.backend for row in support)}, needs one for each of "
            f"{', '.join(BACKENDS)}"
        )
    modules = {name: f"refrag_kernels.{BACKENDS[row.fallback or name].folder}.{family}" for name, row in rows.items()}
    return {name: Implementation(op, row, modules[name], names, dtype_of) for name, row in rows.items()}


def _run_with_values(chosen: Implementation, values: Callable[..., None], args: Sequence):
    """Call an implementation, and check the values of integer tensors when its backend requires that."""
    when = BACKENDS[chosen.backend].values
    if when == "on failure":
        try:
            return chosen.function(*args)
        except RuntimeError:
            values(*args)  # raises an error that names the argument
            raise
    if when == "before" and args[0].device.type == "cpu":
        values(*args)
    elif values_are_checked():
        values(*(_on_host(value) for value in args))
    return chosen.function(*args)


def values_are_checked() -> bool:
    """Return whether REFRAG_KERNELS_CHECK=1 is set: ops on a GPU then check indices, which synchronizes.

    Raises RuntimeError if it is set while a CUDA graph is being captured, which can't contain a synchronization.
    """
    if os.environ.get("REFRAG_KERNELS_CHECK") != "1":
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "REFRAG_KERNELS_CHECK=1 reads indices on the host, which a CUDA graph can't hold: unset it to capture one"
        )
    return True


def _on_host(value: object) -> object:
    is_index = isinstance(value, torch.Tensor) and not value.is_floating_point()
    return value.cpu() if is_index else value  # type: ignore[attr-defined]


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
