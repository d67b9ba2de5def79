"""Losses of preferences by name, one value per pair, on log-probabilities of whole completions in nats.

Names are those of TRL's ``DPOConfig.loss_type`` and ``CPOConfig.loss_type``. With r = log-probability less that of the
reference, d = r(chosen) - r(rejected), s the logistic function and e the label smoothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scores(NamedTuple):
    """Pairs' completions, each [pairs]: sums of log-probabilities, those of the reference (0 without one), tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.rejected_reference

    @property
    def margin(self) -> Tensor:
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_margin(self) -> Tensor:
        """The margin of means over each completion's tokens."""
        return self.chosen_ratio / self.chosen_length - self.rejected_ratio / self.rejected_length


Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def diverged(scores: Scores, kind: Divergence, alpha: float = 0.5) -> Scores:
    """Scores whose ratios are ``f'(t)`` of the ratios' exponentials t (f-DPO; Wang et al., 2023).

    forward_kl: 1 - 1/t. js_divergence: log(2 t / (t + 1)). alpha_divergence: (t^(alpha - 1) - 1) / (alpha - 1), log t
    for alpha 1. reverse_kl: log t, which leaves them as they are.
    """
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(alpha - 1.0) < 1e-6):
        return scores

    def of(ratio: Tensor) -> Tensor:
        if kind == "forward_kl":
            return 1.0 - torch.exp(-ratio)
        if kind == "js_divergence":
            return math.log(2.0) + F.logsigmoid(ratio)
        return torch.expm1(((alpha - 1.0) * ratio).clamp(max=80.0)) / (alpha - 1.0)

    none = torch.zeros_like(scores.chosen_reference)
    return scores._replace(
        chosen=of(scores.chosen_ratio),
        rejected=of(scores.rejected_ratio),
        chosen_reference=none,
        rejected_reference=none,
    )


def alpha_rewards(scores: Scores, alpha: float, *, means: bool) -> Scores:
    """Scores with ``(1 - p^-alpha) / alpha`` in the place of log p, alpha not 0 (AlphaPO; Gupta et al., 2025).

    Args:
        means: p is the geometric mean over a completion's tokens, and the loss divides by their number.
    """

    def of(logprob: Tensor, length: Tensor) -> Tensor:
        length = length if means else torch.ones_like(length)
        return -torch.expm1(-alpha * logprob / length) / alpha * length

    return scores._replace(
        chosen=of(scores.chosen, scores.chosen_length), rejected=of(scores.rejected, scores.rejected_length)
    )


class Settings(NamedTuple):
    """What the losses take beside the scores."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5


PreferenceLoss = Callable[[Scores, Settings], Tensor]


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def sigmoid(scores: Scores, settings: Settings) -> Tensor:
    """``-(1 - e) log s(beta d) - e log s(-beta d)``: DPO (Rafailov et al., 2023), conservative with e > 0."""
    return _smoothed(settings.beta * scores.margin, settings.label_smoothing)


def sigmoid_norm(scores: Scores, settings: Settings) -> Tensor:
    """``sigmoid`` of means over tokens."""
    return _smoothed(settings.beta * scores.mean_margin, settings.label_smoothing)


def hinge(scores: Scores, settings: Settings) -> Tensor:
    """``max(0, 1 - beta d)``: SLiC (Zhao et al., 2023), RSO (Liu et al., 2023)."""
    return F.relu(1 - settings.beta * scores.margin)


def ipo(scores: Scores, settings: Settings) -> Tensor:
    """``(d - 1 / (2 beta))^2``, d of means over tokens: IPO (Azar et al., 2024)."""
    return (scores.mean_margin - 1 / (2 * settings.beta)).square()


def exo_pair(scores: Scores, settings: Settings) -> Tensor:
    """``KL(s(beta d), s(-beta d) || 1 - e, e)``: EXO (Ji et al., 2024); e > 0."""
    logits, smoothing = settings.beta * scores.margin, settings.label_smoothing
    wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    return wins + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))


def nca_pair(scores: Scores, settings: Settings) -> Tensor:
    """``-log s(beta r_c) - (log s(-beta r_c) + log s(-beta r_r)) / 2``: NCA (Chen et al., 2024)."""
    chosen, rejected = settings.beta * scores.chosen_ratio, settings.beta * scores.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def bco_pair(scores: Scores, settings: Settings) -> Tensor:
    """``-log s(beta r_c) - log s(-beta r_r)``: binary classifier optimisation (Jung et al., 2024), of a pair."""
    return -F.logsigmoid(settings.beta * scores.chosen_ratio) - F.logsigmoid(-settings.beta * scores.rejected_ratio)


def aot(scores: Scores, settings: Settings) -> Tensor:
    """``sigmoid`` of sorted margins less the reference's sorted margins: AOT (Melnyk et al., 2024).

    Sorted are the pairs of one call.
    """
    margins = (scores.chosen - scores.rejected).sort().values
    reference = (scores.chosen_reference - scores.rejected_reference).sort().values
    return _smoothed(settings.beta * (margins - reference), settings.label_smoothing)


def aot_unpaired(scores: Scores, settings: Settings) -> Tensor:
    """``sigmoid`` of sorted r_c less sorted r_r: AOT (Melnyk et al., 2024), for completions that are no pairs."""
    delta = scores.chosen_ratio.sort().values - scores.rejected_ratio.sort().values
    return _smoothed(settings.beta * delta, settings.label_smoothing)


def robust(scores: Scores, settings: Settings) -> Tensor:
    """``(-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)``: Chowdhury et al. (2024); e < 1/2."""
    logits, smoothing = settings.beta * scores.margin, settings.label_smoothing
    return (smoothing * F.logsigmoid(-logits) - (1 - smoothing) * F.logsigmoid(logits)) / (1 - 2 * smoothing)


def sppo_hard(scores: Scores, settings: Settings) -> Tensor:
    """``(r_c - 1 / (2 beta))^2 + (r_r + 1 / (2 beta))^2``: SPPO (Wu et al., 2024), the winner's probability 1."""
    goal = 0.5 / settings.beta
    return (scores.chosen_ratio - goal).square() + (scores.rejected_ratio + goal).square()


def apo_zero(scores: Scores, settings: Settings) -> Tensor:
    """``1 - s(beta r_c) + s(beta r_r)``: APO (D'Oosterlinck et al., 2024), chosen better than the model's own."""
    return torch.sigmoid(-settings.beta * scores.chosen_ratio) + torch.sigmoid(settings.beta * scores.rejected_ratio)


def apo_down(scores: Scores, settings: Settings) -> Tensor:
    """``s(beta r_c) + 1 - s(beta d)``: APO (D'Oosterlinck et al., 2024), chosen worse than the model's own."""
    return torch.sigmoid(settings.beta * scores.chosen_ratio) + torch.sigmoid(-settings.beta * scores.margin)


def discopop(scores: Scores, settings: Settings) -> Tensor:
    """``-(1 - w) log s(beta d) + w exp(-beta d)``, w = s(beta d / tau): DiscoPOP (Lu et al., 2024)."""
    logits = settings.beta * scores.margin
    weight = torch.sigmoid(logits / settings.discopop_tau)
    return -(1 - weight) * F.logsigmoid(logits) + weight * torch.exp(-logits)


def simpo(scores: Scores, settings: Settings) -> Tensor:
    """``sigmoid`` of ``beta d - gamma``, d of means over tokens: SimPO (Meng et al., 2024)."""
    return _smoothed(settings.beta * scores.mean_margin - settings.simpo_gamma, settings.label_smoothing)


def odds_ratio(scores: Scores, settings: Settings) -> Tensor:
    """``-beta log s(log odds(chosen) - log odds(rejected))``: ORPO (Hong et al., 2024).

    odds(p) = p / (1 - p), p the geometric mean of the probabilities of a completion's tokens.
    """
    chosen, rejected = scores.chosen / scores.chosen_length, scores.rejected / scores.rejected_length
    odds = chosen - rejected - _log_of_rest(chosen) + _log_of_rest(rejected)
    return -settings.beta * F.logsigmoid(odds)


def _log_of_rest(logprob: Tensor) -> Tensor:
    """``log(1 - exp(x))``, finite where x rounds to 0."""
    return torch.log(-torch.expm1(logprob.clamp_max(-torch.finfo(logprob.dtype).eps)))


WITH_REFERENCE: Mapping[str, PreferenceLoss] = {
    one.__name__: one
    for one in (
        sigmoid, sigmoid_norm, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero,
        apo_down, discopop,
    )
}  # fmt: skip
"""``loss_type`` of ``dpo``."""
WITHOUT_REFERENCE: Mapping[str, PreferenceLoss] = {
    "sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "simpo": simpo,
}  # fmt: skip
"""``loss_type`` of ``cpo``."""
