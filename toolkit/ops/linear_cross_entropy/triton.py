"""The cross-entropy of a head on a GPU: the kernels of ``linear_logprob``, backward straight after forward."""

import torch

from toolkit.ops.linear_cross_entropy.reference import row_factors
from toolkit.ops.linear_logprob.triton import linear_logprob
from toolkit.ops.linear_logprob.triton_backward import linear_logprob_backward


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_weights: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, ...]:
    """``toolkit::linear_cross_entropy`` on a GPU (or on CPU tensors in Triton's interpreter).

    The logits are computed twice, so no product is saved, and 16-bit gradients are rounded once before they are
    multiplied by that of the loss. A target of V or more gives NaN.
    """
    chosen, weights = row_factors(hidden, targets, row_weights)
    logprob, lse, entropy, *_ = linear_logprob(hidden, weight, bias, chosen, None, 1.0, 0.0, 0)
    loss = -(logprob[:, 0] * weights).sum()
    none = torch.zeros_like(lse)
    gradients = linear_logprob_backward(
        -weights[:, None], none, none, none, hidden, weight, bias, chosen, None, lse, entropy, 1.0, 0.0,
        need_hidden, need_weight, need_bias,
    )  # fmt: skip
    return loss, *(gradient.to(loss.dtype) for gradient in gradients)
