"""Cross-entropy of a language model's head and its gradients in plain torch: the specification. It holds the logits."""

import torch
from torch import Tensor

from toolkit.ops.linear_logprob import reference
from toolkit.ops.rowwise import compute_dtype

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def row_factors(hidden: Tensor, targets: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(targets [T, 1], negative where a row counts for nothing; weights [T] in the dtype of the arithmetic)."""
    if row_weights is None:
        return targets[:, None], torch.ones(targets.shape, dtype=compute_dtype(hidden), device=hidden.device)
    weights = row_weights.detach().to(compute_dtype(hidden))
    return torch.where(weights == 0, -1, targets)[:, None], weights


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    """``loss = sum_r w_r (lse_r - z_r[target_r])`` and its gradients, an empty tensor for one that is not needed.

    ``d z_r = w_r (softmax(z_r) - onehot(target_r))``; ``d hidden = d z W``, ``d weight = d z^T hidden``, ``d bias =
    sum_r d z_r``, in float32 (float64 for float64). The loss is differentiable by autograd too.
    """
    chosen, weights = row_factors(hidden, targets, row_weights)
    logprob, lse, entropy, *_ = reference.linear_logprob(hidden, weight, bias, chosen, None, 1.0, 0.0, 0)
    loss = -(logprob[:, 0] * weights).sum()
    zero = torch.zeros_like(weights)
    with torch.no_grad():
        hidden_up, weight_up = (x.to(weights.dtype) for x in (hidden, weight))
        shift = None if bias is None else bias.to(weights.dtype)
        dh, dw, db = reference.linear_logprob_backward(
            -weights[:, None], zero, zero, zero, hidden_up, weight_up, shift, chosen, None, lse, entropy, 1.0, 0.0,
            need_hidden, need_weight, need_bias,
        )  # fmt: skip
    none = [zero.new_empty(0) for _ in range(3)]
    return (
        loss,
        dh if need_hidden else none[0],
        dw if need_weight else none[1],
        db if need_bias and bias is not None else none[2],
    )


def linear_cross_entropy_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    def made(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=compute_dtype(hidden))

    return (
        made(),
        made(*hidden.shape) if need_hidden else made(0),
        made(*weight.shape) if need_weight else made(0),
        made(*bias.shape) if need_bias and bias is not None else made(0),
    )
