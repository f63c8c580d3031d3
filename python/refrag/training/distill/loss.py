"""The distillation loss over the whole vocabulary and its gradient, computed one block of rows at a time."""

from __future__ import annotations

from typing import Any

import torch


def distillation_loss(
    hidden: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    head: torch.Tensor,
    *,
    cross_entropy: float,
    block: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss of n rows, the first m of which have a teacher.

    The loss of a row with a teacher is ``KL(teacher || student) + cross_entropy * CE``; that of a row without one is
    ``CE``. Logits are float32 and exist only for one block of rows at a time, once for the student and once for the
    teacher: the forward pass also computes the gradient, so no logits are kept.

    Parameters
    ----------
    hidden : Tensor [n, d]
        The student's last hidden states, after its final norm.
    teacher : Tensor [m, d]
        The teacher's, for the first m rows, m <= n.
    targets : Tensor, integer [n]
        The next token of each row.
    head : Tensor [V, d]
        The output layer that both share; it gets no gradient.
    cross_entropy : float
        Weight of the cross-entropy in rows with a teacher.
    block : int
        Rows per block.

    Returns
    -------
    loss : Tensor []
        The mean over the n rows.
    sums : Tensor, float32 [3]
        The KL divergence and the cross-entropy summed over the first m rows, and the cross-entropy over the others.

    Examples
    --------
    >>> hidden = torch.randn(6, 8, requires_grad=True)
    >>> loss, sums = distillation_loss(
    ...     hidden, hidden[:4].detach(), torch.arange(6), torch.randn(20, 8), cross_entropy=0.0
    ... )
    >>> bool(sums[0].abs() < 1e-5), bool(torch.isclose(loss, sums[2] / 6, atol=1e-5))  # the student is its own teacher
    (True, True)
    """
    return _BlockLoss.apply(hidden, teacher, targets, head, cross_entropy, block)  # type: ignore[no-any-return]


class _BlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, teacher: Any, targets: Any, head: Any, weight: float, block: int) -> Any:
        rows, taught = hidden.shape[0], teacher.shape[0]
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        # A block has either only rows with a teacher or only rows without one.
        edges = sorted({*range(0, taught, block), *range(taught, rows, block), rows})
        for start, end in zip(edges, edges[1:]):
            wanted = targets[start:end, None].long()
            own = _logits(hidden[start:end], head).log_softmax(1)
            entropy = -own.gather(1, wanted)
            if start < taught:
                theirs = _logits(teacher[start:end], head).log_softmax(1)
                sums[0] += (theirs - own).mul_(theirs.exp_()).sum()
                sums[1] += entropy.sum()
                # theirs now contains the teacher's probabilities; own becomes the gradient.
                own.exp_().mul_(1 + weight).sub_(theirs)
                own.scatter_add_(1, wanted, torch.full_like(entropy, -weight))
            else:
                sums[2] += entropy.sum()
                own.exp_().scatter_add_(1, wanted, torch.full_like(entropy, -1.0))
            grad[start:end] = own.to(hidden.dtype) @ head
        ctx.save_for_backward(grad)
        ctx.rows = rows
        ctx.mark_non_differentiable(sums)
        return (sums[0] + weight * sums[1] + sums[2]) / rows, sums

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * (grads[0] / ctx.rows).to(grad.dtype), None, None, None, None, None


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return float32 logits; products of bfloat16 rows are not rounded to bfloat16 first."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
    return (hidden @ head.t()).float()
