"""Error bounds against float64, and how errors are measured (docs: Accuracy)."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Bounds on the relative error in the Frobenius norm.
OUTPUT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
GRADIENT = {torch.float64: 1e-12, torch.float32: 8e-6, torch.bfloat16: 8e-3, torch.float16: 8e-3}
LSE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def relative_error(actual: torch.Tensor, expected: torch.Tensor, upstream: torch.Tensor | None = None) -> float:
    """Return |actual - expected| / max(|expected|, 0.01 |upstream|) in the Frobenius norm; NaN counts as infinite.

    ``upstream`` is the incoming gradient, the scale for gradients that cancel to almost zero.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.double(), expected.double()
    if not torch.equal(actual.isneginf(), expected.isneginf()):
        return float("inf")
    finite = ~expected.isneginf()
    actual, expected = actual[finite], expected[finite]
    if not actual.isfinite().all():
        return float("inf")
    floor = 0.0 if upstream is None else 1e-2 * float(upstream.double().norm())
    difference = float((actual - expected).norm())
    return difference / max(float(expected.norm()), floor, 1e-30) if difference else 0.0
