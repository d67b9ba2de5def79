"""XTC, exclude top choices: leaves out the most probable tokens where others are probable enough, now and then."""

import torch
from torch import Tensor

_STREAM = 0x5851F42D4C957F2D  # of the seeds, for other numbers than those that choose the tokens


def xtc_removed(logits: Tensor, probability: float, threshold: float, seed: int, step: int) -> Tensor:
    """[V] bool: the tokens that are left out.

    With ``probability``: of the tokens with ``softmax(logits) >= threshold`` all but the least probable one (among
    equals the highest id). In float64. The chance is a function of (seed, step), as the sample is.

    Args:
        logits: [V], -inf for tokens that are not sampled anyway.
        probability: 0 to 1.
        threshold: 0 to 1; above 0.5 nothing is left out.
        seed: of the sequence.
        step: tokens of output so far.

    Source: P. E. Weidmann, "Exclude Top Choices", text-generation-webui pull request 6335 (2024).
    """
    removed = torch.zeros_like(logits, dtype=torch.bool)
    if _uniform(seed, step) >= probability:
        return removed
    probabilities = logits.double().softmax(-1)
    above = (probabilities >= threshold).nonzero().squeeze(-1)
    if len(above) > 1:
        order = probabilities[above].sort(descending=True, stable=True).indices
        removed[above[order[:-1]]] = True
    return removed


def _uniform(seed: int, step: int) -> float:
    """A multiple of 2**-53 in [0, 1): SplitMix64's mix of the seed, and again with the step added."""
    return (_mixed(_mixed(seed ^ _STREAM) + step) >> 11) * 2.0**-53


def _mixed(word: int) -> int:
    word %= 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)
