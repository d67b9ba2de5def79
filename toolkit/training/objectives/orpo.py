"""Odds ratio preference optimisation: fine-tuning and preference in one, without a reference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from toolkit.training.objectives.pairs import Pair
from toolkit.training.objectives.preference import Preference, PreferenceSection

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.training.preference_losses import Scores


class ORPOSection(PreferenceSection):
    """Odds ratio preference optimisation (Hong et al., 2024).

    ``beta`` weighs the odds ratio beside the cross-entropy of the chosen completion.
    """

    kind: Literal["orpo"] = "orpo"
    completion_only_loss: bool = True
    """The cross-entropy is a mean over each chosen completion's tokens, then over pairs. false: over the tokens of all
    prompts and chosen completions of the step, as in TRL."""


class ORPO(Preference[ORPOSection]):
    """The rewards that it logs are beta times the log-probabilities."""

    def preference_loss(self, scores: "Scores") -> "Tensor":
        from toolkit.training.preference_losses import Settings, odds_ratio

        return odds_ratio(scores, Settings(self.section.beta))

    def supervised_weight(self) -> float:
        return 1.0

    def supervised_tokens(self, pair: Pair) -> int:
        return len(pair.prompt) + len(pair.chosen) - 1  # the first token of a sequence is predicted by none

    def predicted(self, micro: Sequence[Pair], lengths: list[int]) -> list[int]:
        if self.section.completion_only_loss:
            return lengths
        return [count + (len(micro[at // 2].prompt) - 1) * (at % 2 == 0) for at, count in enumerate(lengths)]

    def cross_entropy(self, micro: Sequence[Pair], logprobs: "Sequence[Tensor]") -> "Tensor":
        import torch

        if not self.section.completion_only_loss:
            return super().cross_entropy(micro, logprobs)
        means = torch.stack([values.mean() for values in logprobs])
        return -(means * means.new_tensor([pair.weight for pair in micro])).sum()
