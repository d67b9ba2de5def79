"""REINFORCE++: advantages of tokens, normalised over all tokens of a step."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from toolkit.config.base import Count
from toolkit.training.objectives.base import RunContext
from toolkit.training.objectives.grpo import GRPO
from toolkit.training.objectives.grpo_section import GRPOSection
from toolkit.training.samples import Sample, pack

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.engine.outputs import Completion
    from toolkit.training.losses import KLEstimator
    from toolkit.training.reference import Reference


class ReinforcePlusPlusSection(GRPOSection):
    """REINFORCE++ (Hu et al., 2025); fields beyond those of ``grpo`` have the names of OpenRLHF's options."""

    unused_fields: ClassVar[Sequence[str]] = ("scale_rewards", "multi_objective_aggregation")

    kind: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"  # type: ignore[assignment]
    num_generations: Count = 8
    """Completions per prompt; 1 will do for ``advantage_estimator: reinforce``."""
    advantage_estimator: Literal["reinforce", "reinforce_baseline"] = "reinforce"
    """reinforce_baseline takes the mean of its group off a completion's reward."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """As of grpo."""
    beta: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the KL divergence from the initial model (OpenRLHF's ``init_kl_coef``), taken off the reward of each
    token, or in the loss."""
    use_kl_loss: bool = False
    """Whether the divergence is in the loss and not in the rewards."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """With d = log p - log p_initial of a sampled token: d, d^2 / 2, or e^-d - 1 + d. For ``use_kl_loss`` k2 or k3."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a token's reward for each token before it."""
    reward_clip_range: Annotated[
        tuple[float, float] | None, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
    ] = None
    """Bounds of a completion's reward; null bounds none."""

    @model_validator(mode="after")
    def _several_for_a_baseline(self) -> Self:
        if self.advantage_estimator == "reinforce_baseline" and self.num_generations < 2:
            raise ValueError(
                "objective.num_generations must be >= 2 with objective.advantage_estimator 'reinforce_baseline', got "
                f"{self.num_generations}"
            )
        if self.use_kl_loss and self.kl_estimator == "k1":
            raise ValueError("objective.kl_estimator must be 'k2' or 'k3' with objective.use_kl_loss, got 'k1'")
        return self


class ReinforcePlusPlus(GRPO, section=ReinforcePlusPlusSection):
    """``A_t = sum_{k >= t} gamma^(k - t) r_k`` less the mean over all tokens of a step, over their deviation.

    ``r_k`` is ``-beta KL_k``, and the last token's has the completion's reward beside it.
    """

    section: Any

    @property
    def least_scored(self) -> int:  # type: ignore[override]
        return 2 if self.section.advantage_estimator == "reinforce_baseline" else 1

    @property
    def kl_estimator(self) -> "KLEstimator":
        found: KLEstimator = self.section.kl_estimator
        return found

    def bind(self, context: RunContext) -> None:
        super().bind(context)
        self._initial: Reference | None = None
        if not self.section.use_kl_loss:
            self._initial, self.reference = self.reference, None

    def advantages(self, rewards: "Tensor", completions: Sequence[Sequence["Completion"]]) -> "Tensor":
        """[groups, n] rewards, less the group's mean where there is a baseline."""
        if self.section.reward_clip_range is not None:
            rewards = rewards.clamp(*self.section.reward_clip_range)
        if self.section.advantage_estimator == "reinforce_baseline":
            rewards = rewards - rewards.nanmean(1, keepdim=True)
        return rewards.nan_to_num(0.0)

    def finish_advantages(self, groups: Sequence[Sequence[Sample]]) -> None:
        import torch

        from toolkit.training.losses import discounted_returns, kl_estimate

        samples = [sample for group in groups for sample in group]
        if self._initial is not None:
            self.remember_reference(self._initial, pack(groups, self.recipe.train.batch_tokens))
            self.sums.add(divergence=0.0, judged_tokens=0.0)  # a process may have no sample
        returns = []
        for sample in samples:
            rewards = torch.zeros(len(sample.behaviour), dtype=torch.float64)
            if sample.reference is not None and self._initial is not None:
                behaviour = torch.tensor(sample.behaviour, dtype=torch.float64)
                divergence = kl_estimate(behaviour, sample.reference.double().cpu(), self.kl_estimator)
                rewards -= self.section.beta * divergence
                self.sums.add(divergence=divergence.sum().item(), judged_tokens=len(divergence))
            rewards[-1:] += sample.advantage
            returns.append(discounted_returns(rewards, self.section.gamma))
        trained = torch.cat([torch.zeros(0, dtype=torch.float64)] + [
            one for one, sample in zip(returns, samples) if not sample.masked
        ])  # fmt: skip
        count, total = self.context.reduce_sum([len(trained), trained.sum().item()])
        mean = total / max(count, 1.0)
        (squares,) = self.context.reduce_sum([(trained - mean).square().sum().item()])
        scale = 1.0 / math.sqrt(max(squares / max(count, 1.0), 1e-8))
        for sample, one in zip(samples, returns):
            sample.advantages = ((one - mean) * scale).tolist()

    def divergence_metrics(self, got: dict[str, float]) -> dict[str, float]:
        if self._initial is None:
            return super().divergence_metrics(got)
        return {"kl": got["divergence"] / max(got["judged_tokens"], 1.0)}
