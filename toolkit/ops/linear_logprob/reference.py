"""Log-probabilities of a language model's head in plain torch: the specification. It holds the logits."""

import torch
from torch import Tensor

from toolkit.ops.linear.reference import linear as linear_reference
from toolkit.ops.rowwise import compute_dtype, elementwise, row_sum

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature`` [T, V].

    In float32 (float64 for float64). The product is rounded to hidden's dtype first, as the output of a head is.
    """
    z = linear_reference(hidden, weight, bias).to(compute_dtype(hidden))
    if scale != 1.0:
        z = z * scale
    if softcap > 0.0:
        z = elementwise(torch.tanh, z / softcap) * softcap
    return z if temperature is None else z / temperature.to(z.dtype)[:, None]


def linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | None,
    scale: float, softcap: float, top_k: int,
) -> Outputs:  # fmt: skip
    """logprob [T, C] (0 where the target is negative), lse, entropy, mean logit [T], top values and ids [T, top_k].

    Differentiable. A row's bits do not depend on the other rows.
    """
    z = logits(hidden, weight, bias, temperature, scale, softcap)
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    shifted = z - top
    e = elementwise(torch.exp, shifted)
    total = row_sum(e).squeeze(-1)
    log_sum = elementwise(torch.log, total)
    moment = row_sum(e * shifted.clamp_min(-1e4)).squeeze(-1)
    own = shifted.gather(-1, targets.clamp_min(0))
    logprob = torch.where(targets < 0, 0.0, own - log_sum[:, None])
    # A stable sort of the negated values puts the lower id first among equals, which topk does not promise.
    order = torch.sort(z.detach(), dim=-1, descending=True, stable=True)
    return (
        logprob,
        log_sum + top.squeeze(-1),
        log_sum - moment / total,
        row_sum(z).squeeze(-1) / z.shape[-1],
        order.values[:, :top_k].contiguous(),
        order.indices[:, :top_k].contiguous(),
    )


def linear_logprob_backward(
    grad_logprob: Tensor, grad_lse: Tensor, grad_entropy: Tensor, grad_mean: Tensor,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | None,
    lse: Tensor, entropy: Tensor, scale: float, softcap: float,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to hidden, weight and bias; an empty tensor for one that is not needed.

    ``d z = p (g_lse - sum_c g_c - g_entropy (log p + H)) + g_mean / V + sum_c g_c [target_c]`` with
    ``p = exp(z - lse)``, over targets that are not negative;
    ``d product = d z * scale * (1 - (z temperature / softcap)^2) / temperature``.
    """
    z = logits(hidden, weight, bias, temperature, scale, softcap)
    ignored = targets < 0
    g = torch.where(ignored, 0.0, grad_logprob.to(z.dtype))
    log_p = z - lse.to(z.dtype)[:, None]
    common = (grad_lse.to(z.dtype) - g.sum(-1))[:, None]
    entropy_term = log_p.clamp_min(-1e4) + entropy.to(z.dtype)[:, None]
    # Without a gradient a term must stay out: the entropy term of a row without probabilities is NaN.
    of_entropy = grad_entropy.to(z.dtype)[:, None]
    factor = torch.where(of_entropy == 0, common, common - of_entropy * entropy_term)
    dz = torch.exp(log_p) * factor + grad_mean.to(z.dtype)[:, None] / z.shape[-1]
    dz = dz.scatter_add(-1, targets.clamp_min(0), g)
    if temperature is not None:
        z, dz = z * temperature.to(z.dtype)[:, None], dz / temperature.to(z.dtype)[:, None]
    if softcap > 0.0:
        dz = dz * (1 - (z / softcap).square())
    dz = dz * scale
    passes = ((g != 0).any(-1) | (grad_lse != 0) | (grad_entropy != 0) | (grad_mean != 0))[:, None]
    dz = torch.where(passes, dz, 0.0)
    none = hidden.new_empty(0)
    return (
        (dz @ weight.to(dz.dtype)).to(hidden.dtype) if need_hidden else none,
        (dz.T @ hidden.to(dz.dtype)).to(weight.dtype) if need_weight else none,
        dz.sum(0).to(bias.dtype) if need_bias and bias is not None else none,
    )


def linear_logprob_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | None,
    scale: float, softcap: float, top_k: int,
) -> Outputs:  # fmt: skip
    rows, dtype = targets.shape[0], compute_dtype(hidden)
    logprob = hidden.new_empty(targets.shape, dtype=dtype)
    statistics = [hidden.new_empty(rows, dtype=dtype) for _ in range(3)]
    top = hidden.new_empty((rows, top_k), dtype=dtype)
    return logprob, *statistics, top, hidden.new_empty((rows, top_k), dtype=torch.int64)  # type: ignore[return-value]


def linear_logprob_backward_fake(
    grad_logprob: Tensor, grad_lse: Tensor, grad_entropy: Tensor, grad_mean: Tensor,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | None,
    lse: Tensor, entropy: Tensor, scale: float, softcap: float,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = hidden.new_empty(0)
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else none,
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else none.clone(),
        bias.new_empty(bias.shape) if need_bias and bias is not None else none.clone(),
    )
