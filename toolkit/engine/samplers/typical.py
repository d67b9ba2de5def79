"""Locally typical sampling: tokens whose information is near what the distribution's is on average."""

import torch
from torch import Tensor


def typical_tokens(logits: Tensor, mass: float) -> Tensor:
    """[V] bool: the tokens that stay.

    ``p = softmax(logits)``; tokens in ascending order of ``|-log p - H(p)|`` (among equals the lower id first) up to
    the first at which their probabilities reach ``mass``. In float64.

    Args:
        logits: [V], -inf for tokens that are not sampled anyway.
        mass: > 0, < 1.

    Source: Meister et al., "Locally Typical Sampling" (2022).
    """
    logprobs = logits.double().log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).nansum()  # a probability of 0 adds nothing
    order = (-logprobs - entropy).abs().sort(stable=True).indices
    count = int((probabilities[order].cumsum(-1) < mass).sum()) + 1
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[order[:count]] = True
    return kept
