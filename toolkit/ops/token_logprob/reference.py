"""Log-probability of given tokens in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.rowwise import compute_dtype, elementwise, row_sum, upcast


def token_logprob(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``logits[t, y] - lse[t]`` (0 where y < 0) and ``lse``, in float32 (float64 for float64).

    Differentiable. A row's bits do not depend on the other rows.
    """
    z = upcast(logits)
    top = z.detach().amax(-1, keepdim=True)
    shifted = z - torch.where(top == -torch.inf, 0.0, top)
    log_sum = elementwise(torch.log, row_sum(elementwise(torch.exp, shifted)).squeeze(-1))
    own = shifted.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    logprob = torch.where(targets < 0, 0.0, own - log_sum)
    return logprob, log_sum + torch.where(top == -torch.inf, 0.0, top).squeeze(-1)


def token_logprob_backward(
    grad_logprob: Tensor, grad_lse: Tensor, logits: Tensor, targets: Tensor, lse: Tensor
) -> Tensor:
    """``g (onehot - softmax) + g_lse softmax``, with g = 0 where the target is negative."""
    ignored = targets < 0
    g = torch.where(ignored, 0.0, grad_logprob.to(lse.dtype))
    softmax = torch.exp(upcast(logits) - lse[..., None])
    factor = (grad_lse.to(lse.dtype) - g)[..., None]
    grad = torch.where(factor == 0, 0.0, softmax * factor)
    return grad.scatter_add(-1, targets.clamp_min(0)[..., None], g[..., None]).to(logits.dtype)


def token_logprob_fake(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(targets.shape, dtype=compute_dtype(logits), device=logits.device)
    return out, torch.empty_like(out)


def token_logprob_backward_fake(
    grad_logprob: Tensor, grad_lse: Tensor, logits: Tensor, targets: Tensor, lse: Tensor
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
