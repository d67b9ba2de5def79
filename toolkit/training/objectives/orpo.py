"""Odds ratio preference optimisation: fine-tuning and preference in one, without a reference."""

from typing import TYPE_CHECKING, Literal

from toolkit.training.objectives.preference import Preference, PreferenceSection

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.training.preference_losses import Scores


class ORPOSection(PreferenceSection):
    """Odds ratio preference optimisation (Hong et al., 2024); ``beta`` weighs the odds ratio beside the cross-entropy
    of the chosen completion, a mean over its tokens (TRL's is over the prompt's too)."""

    kind: Literal["orpo"] = "orpo"


class ORPO(Preference[ORPOSection]):
    """The rewards that it logs are beta times the log-probabilities."""

    def preference_loss(self, scores: "Scores") -> "Tensor":
        from toolkit.training.preference_losses import Settings, odds_ratio

        return odds_ratio(scores, Settings(self.section.beta))

    def supervised_weight(self) -> float:
        return 1.0
