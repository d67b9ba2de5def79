"""Log-probabilities of given tokens straight from hidden states: a head and a softmax that never hold the logits.

What stands under every objective (cross-entropy, preference and policy losses, distillation) and under scoring.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.linear_logprob import reference
from toolkit.ops.registry import Op, register_differentiable

__all__ = ["LinearLogprob", "linear_logprob"]


class LinearLogprob(NamedTuple):
    """Per row of the hidden states, in nats: see ``linear_logprob``."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    mean: Tensor
    top_logprobs: Tensor
    top_ids: Tensor


_OP: Op[tuple[Tensor, ...]]
_OP, _ = register_differentiable(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? temperature, float scale,"
    " float softcap, int top_k) -> (Tensor logprob, Tensor lse, Tensor entropy, Tensor mean,"
    " Tensor top_values, Tensor top_ids)",
    "linear_logprob_backward(Tensor grad_logprob, Tensor grad_lse, Tensor grad_entropy, Tensor grad_mean,"
    " Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? temperature, Tensor lse, Tensor entropy,"
    " float scale, float softcap, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    gradients=("hidden", "weight", "bias"),
    reference=reference,
    triton="toolkit.ops.linear_logprob.triton",
    triton_backward="toolkit.ops.linear_logprob.triton_backward",
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    impl: str | None = None,
) -> LinearLogprob:
    """Log-probabilities under ``softmax(z)``, ``z = softcap tanh(scale (hidden W^T + bias) / softcap) / temperature``.

    hidden: [..., K], leading shape R; weight: [V, K] of the same dtype; bias: [V] or None; softcap 0: no cap.
    targets: R, or R + [C] for C candidates a row; int64 below V, a negative one is ignored (0, without gradient).
    temperature: a positive number or a tensor of shape R; no gradient to it.
    float32, float64, bfloat16 or float16; 16-bit products are rounded to their dtype as a head's output is, everything
    after that is float32.

    Returns, in nats, float32 (float64 for float64), each with its exact gradient to hidden, weight and bias:
    ``logprob`` (shape of targets) z[target] - lse; ``lse`` (R) log sum_v exp z_v; ``entropy`` (R)
    -sum_v p_v log p_v; ``mean`` (R) sum_v z_v / V, for label smoothing. Without gradient: ``top_logprobs``, ``top_ids``
    (R + [top_k]), the likeliest tokens, best first, the lower id among equals.

    The logits are held a tile at a time, forward and backward, and computed again for the backward, where rows without
    any gradient (masked targets) cost nothing. Saved for backward: the inputs, lse and entropy. On CPU a row's bits
    depend on that row alone, and ``logprob`` and ``lse`` are those of ``token_logprob(linear(hidden, weight, bias))``,
    where z is the plain product. Entries of -inf have probability 0; a row with NaN gives NaN.
    Errors: ToolkitError for other shapes or a temperature that is not positive; on CPU IndexError for a target of V
    or more.
    """
    rows = hidden.shape[:-1]
    if targets.shape[: len(rows)] != rows or targets.dim() - len(rows) not in (0, 1):
        raise ToolkitError(
            f"targets have shape {list(targets.shape)}; hidden of shape {list(hidden.shape)} needs {list(rows)}"
            f" or {[*rows, 'C']}."
        )
    if not 0 <= top_k <= weight.shape[0]:
        raise ToolkitError(f"top_k is {top_k}; allowed are 0 to the vocabulary size {weight.shape[0]}.")
    per_row: Tensor | None = None
    if isinstance(temperature, Tensor):
        if temperature.shape != rows:
            raise ToolkitError(f"temperature has shape {list(temperature.shape)}; allowed is {list(rows)}.")
        per_row = temperature.reshape(-1)
    elif not temperature > 0.0:
        raise ToolkitError(f"temperature is {temperature}; allowed are numbers above 0.")
    elif temperature != 1.0:
        per_row = torch.full((rows.numel(),), temperature, device=hidden.device, dtype=torch.float64)
    several = targets.dim() > len(rows)
    flat = targets.reshape(rows.numel(), targets.shape[-1] if several else 1)
    arguments = (hidden.reshape(rows.numel(), hidden.shape[-1]), weight, bias, flat, per_row, scale, softcap, top_k)
    logprob, lse, entropy, mean, top_values, top_ids = _OP.select(impl)(*arguments)
    return LinearLogprob(
        logprob.reshape(targets.shape),
        lse.view(rows),
        entropy.view(rows),
        mean.view(rows),
        (top_values - lse.detach()[:, None]).view(*rows, top_k),
        top_ids.view(*rows, top_k),
    )
