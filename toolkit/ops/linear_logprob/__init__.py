"""Log-probabilities of given tokens straight from hidden states: a head and a softmax that never hold the logits.

What stands under every objective (cross-entropy, preference and policy losses, distillation) and under scoring.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.linear_logprob import reference
from toolkit.ops.registry import Op, register_differentiable
from toolkit.ops.targets import checked_targets

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

    Args:
        hidden: [..., K], leading shape R; float32, float64, bfloat16 or float16.
        weight: [V, K] in hidden's dtype.
        targets: R, or R + [C] for C candidates per row; int64, token ids below V. One of -100 is ignored: 0, and no
            gradient, not even NaN from above.
        bias: [V] or None.
        scale: factor of the logits.
        softcap: 0 for none.
        temperature: a number > 0 or a tensor of shape R; no gradient to it.
        top_k: number of most probable tokens to return per row.

    Returns:
        A ``LinearLogprob``, in nats, float32 (float64 for float64):
        logprob: shape of targets; z[target] - lse.
        lse: R; log sum_v exp z_v.
        entropy: R; -sum_v p_v log p_v.
        mean: R; sum_v z_v / V, for label smoothing.
        top_logprobs, top_ids: R + [top_k]; best first, ties by ascending id. No gradient.

    Raises:
        ToolkitError: for other shapes, or a temperature that is not > 0.
        OutOfVocabularyError: on CPU for any other target. On CUDA, where nothing is read back, it gives NaN.

    Numerics: 16-bit GEMMs are rounded to their dtype as a head's output is; everything after that is float32. The
    others have their exact gradient to hidden, weight and bias. The logits are held a tile at a time, forward and
    backward, and recomputed for the backward, where rows without any gradient (masked targets) cost nothing. On CPU
    batch-invariant, and ``logprob`` and ``lse`` are bitwise identical to ``token_logprob(linear(hidden, weight,
    bias))`` where z has no scale, cap or temperature. Entries of -inf have probability 0; a row with NaN gives NaN.
    Saved for backward: the inputs, lse and entropy.
    """
    rows = hidden.shape[:-1]
    if targets.shape[: len(rows)] != rows or targets.dim() - len(rows) not in (0, 1):
        raise ToolkitError(
            f"targets must have shape {list(rows)} or {[*rows, 'C']} for hidden of shape {list(hidden.shape)},"
            f" got {list(targets.shape)}."
        )
    if not 0 <= top_k <= weight.shape[0]:
        raise ToolkitError(f"top_k must be >= 0 and <= the vocabulary size {weight.shape[0]}, got {top_k}.")
    per_row: Tensor | None = None
    if isinstance(temperature, Tensor):
        if temperature.shape != rows:
            raise ToolkitError(f"temperature must have shape {list(rows)}, got {list(temperature.shape)}.")
        per_row = temperature.reshape(-1)
    elif not temperature > 0.0:
        raise ToolkitError(f"temperature must be > 0, got {temperature}.")
    elif temperature != 1.0:
        per_row = torch.full((rows.numel(),), temperature, device=hidden.device, dtype=torch.float64)
    several = targets.dim() > len(rows)
    known = checked_targets(targets, weight.shape[0])
    flat = known.reshape(rows.numel(), targets.shape[-1] if several else 1)
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
