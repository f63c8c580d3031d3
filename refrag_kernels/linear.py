"""linear_rows: a linear layer on a few rows, such as those of a decode step."""

from __future__ import annotations

import torch

from refrag_kernels.registration import register_op
from refrag_kernels.support import REFERENCE, Support
from refrag_kernels.validation import (
    FLOAT_DTYPES,
    check_dtype,
    check_last_contiguous,
    check_same_device,
    check_same_dtype,
    check_shape,
    remembered,
)


@remembered
def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_dtype("weight", weight, *FLOAT_DTYPES)
    check_dtype("x", x, *FLOAT_DTYPES)
    check_shape("weight", weight, "d_out", "d_in")
    check_shape("x", x, "N", weight.shape[1])
    check_same_dtype(weight=weight, x=x)
    check_same_device(weight=weight, x=x, bias=bias)
    check_last_contiguous(x=x, weight=weight)
    if bias is not None:
        check_shape("bias", bias, weight.shape[0])
        check_same_dtype(weight=weight, bias=bias)
        check_last_contiguous(bias=bias)


def _fake(x, weight, bias, *, backend=None):
    _check(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


_linear_rows = register_op(
    "linear_rows(Tensor x, Tensor weight, Tensor? bias, *, str? backend=None) -> Tensor",
    family="linear",
    support=[
        Support("cuda", missing="has no linear_rows: torch's own products are as fast there"),
        Support("triton", missing="has no linear_rows: torch's own products are as fast there"),
        Support("cpu", binds=True),
        REFERENCE,
    ],
    fake=_fake,
    autocast=("x", "weight", "bias"),
)


def linear_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Apply a linear layer to a few rows: y = x W^T + b. All threads share the single read of the unpacked weights.

    With one or two rows the time is that of reading the weights, for which torch uses one thread; this op is therefore
    for decoding on the CPU. With more than about 16 rows ``torch.nn.functional.linear`` is as fast or faster. On other
    devices the reference in plain torch runs.

    Parameters
    ----------
    x : Tensor [N, d_in]
        float32, bfloat16 or float16 (the reference also float64). The last dimension must be contiguous.
    weight : Tensor [d_out, d_in]
        In the order of ``torch.nn.Linear``; in the dtype of ``x``, as ``bias``.
    bias : Tensor [d_out], optional
    backend : str, optional
        Backends that may run this call, in order; default the fastest that supports it.

    Returns
    -------
    Tensor [N, d_out]
        In the dtype of ``x``; accumulated in float32. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape, stride or device is wrong.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> rk.linear_rows(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([[ 3.,  7., 11.]])
    """
    _check(x, weight, bias)
    return _linear_rows(x, weight, bias, backend=backend)


def cpu_linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Run the C++ kernel of ``linear_rows`` without checks or backend selection, on tensors known to be valid."""
    return torch.ops.refrag_cpu.linear_rows(x, weight, bias)
