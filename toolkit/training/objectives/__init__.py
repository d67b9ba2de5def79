"""What training minimises: the mathematics (``functions.py``), and a file for each kind of run."""

from toolkit.training.objectives.functions import (
    PolicyLoss,
    divergence_estimate,
    group_advantages,
    importance_weight,
    jensen_shannon,
    kl_divergence,
    next_token_loss,
    policy_loss,
    preference_loss,
    sequence_mean,
    with_tail,
)

__all__ = [
    "PolicyLoss",
    "divergence_estimate",
    "group_advantages",
    "importance_weight",
    "jensen_shannon",
    "kl_divergence",
    "next_token_loss",
    "policy_loss",
    "preference_loss",
    "sequence_mean",
    "with_tail",
]
