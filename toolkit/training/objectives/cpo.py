"""Contrastive preference optimisation and SimPO: preferences without a reference."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from toolkit.training.objectives.preference import Preference, PreferenceSection

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.training.preference_losses import Scores


class CPOSection(PreferenceSection):
    """Contrastive preference optimisation (Xu et al., 2024). ``loss_type: simpo, cpo_alpha: 0`` is SimPO."""

    kind: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    """The loss of a pair, by TRL's names; ``toolkit/training/preference_losses.py`` has the formulas."""
    cpo_alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the chosen completions' cross-entropy, a mean over the step's tokens of them."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's sides are swapped; of sigmoid and simpo."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5
    """By how much the margin, times beta, is to exceed 0; of simpo."""
    alpha: float = 0.0
    """Rewards are (1 - p^-alpha) / alpha of the probability p in the place of its logarithm (AlphaPO; Gupta et al.,
    2025); 0 is that."""


class CPO(Preference[CPOSection]):
    """The rewards that it logs are beta times the log-probabilities."""

    def preference_loss(self, scores: "Scores") -> "Tensor":
        from toolkit.training.preference_losses import WITHOUT_REFERENCE, Settings, alpha_rewards

        section = self.section
        if section.alpha:
            scores = alpha_rewards(scores, section.alpha, means=section.loss_type in ("ipo", "simpo"))
        settings = Settings(section.beta, section.label_smoothing, simpo_gamma=section.simpo_gamma)
        return WITHOUT_REFERENCE[section.loss_type](scores, settings)

    def supervised_weight(self) -> float:
        return self.section.cpo_alpha
