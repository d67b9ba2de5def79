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

    def weigh(self, pairs: Sequence[Pair]) -> None:
        super().weigh(pairs)
        # The first token of a sequence is predicted by none.
        (total,) = self.context.reduce_sum([sum(len(pair.prompt) + len(pair.chosen) - 1 for pair in pairs)])
        for pair in pairs:
            pair.token_weight = self.context.world_size / total

    def predicted(self, micro: Sequence[Pair], lengths: list[int]) -> list[int]:
        if self.section.completion_only_loss:
            return lengths
        return [count + (len(micro[at // 2].prompt) - 1) * (at % 2 == 0) for at, count in enumerate(lengths)]

    def cross_entropy(self, micro: Sequence[Pair], logprobs: "Sequence[Tensor]") -> "Tensor":
        import torch

        if self.section.completion_only_loss:
            return super().cross_entropy(micro, logprobs)
        return -torch.stack([values.sum() * pair.token_weight for pair, values in zip(micro, logprobs)]).sum()
