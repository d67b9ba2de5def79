"""REINFORCE with a leave-one-out baseline: whole completions are the actions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from toolkit.training.objectives.base import RunContext
from toolkit.training.objectives.grpo import GRPO
from toolkit.training.objectives.grpo_section import GRPOSection

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.engine.outputs import Completion
    from toolkit.training.reference import Reference

_OF_GRPO = (
    "loss_type", "scale_rewards", "multi_objective_aggregation", "importance_sampling_level", "delta",
    "use_bias_correction_kl",
)  # fmt: skip


class RLOOSection(GRPOSection):
    """RLOO (Ahmadian et al., 2024); fields have the names of TRL's ``RLOOConfig``."""

    unused_fields: ClassVar[Sequence[str]] = _OF_GRPO

    kind: Literal["rloo"] = "rloo"  # type: ignore[assignment]
    beta: Annotated[float, Field(ge=0)] = 0.05
    """Weight of ``log p - log p_initial`` of each completion, which is taken off its reward."""
    normalize_advantages: bool = False
    """Whether advantages of a step get mean 0 and standard deviation 1."""
    reward_clip_range: Annotated[
        tuple[float, float] | None, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
    ] = None
    """Bounds of a reward, before the divergence is taken off; null bounds none."""


class RLOO(GRPO, section=RLOOSection):
    """``-min(r a, clip(r) a)`` of each completion, a mean over completions.

    ``r`` is the ratio of its probabilities, ``a`` its reward less the mean of the others of its group.
    """

    section: Any

    @property
    def sequence_ratio(self) -> Literal["none", "mean", "product"]:
        return "product"

    def bind(self, context: RunContext) -> None:
        super().bind(context)
        # The divergence is a part of the reward, not of the loss.
        self._initial: Reference | None = self.reference
        self.reference = None

    def advantages(self, rewards: "Tensor", completions: Sequence[Sequence["Completion"]]) -> "Tensor":
        section = self.section
        if section.reward_clip_range is not None:
            rewards = rewards.clamp(*section.reward_clip_range)
        if self._initial is not None:
            divergence = self._divergence(completions).to(rewards.dtype)
            rewards = rewards - section.beta * divergence
        known = (~rewards.isnan()).sum(1, keepdim=True)
        others = (rewards.nansum(1, keepdim=True) - rewards) / (known - 1)
        advantages = rewards - others
        if section.normalize_advantages:
            mean, deviation = self.moments(advantages)
            advantages = (advantages - mean) / (deviation + 1e-4)
        return advantages.nan_to_num(0.0)

    def _divergence(self, completions: Sequence[Sequence["Completion"]]) -> "Tensor":
        """[groups, n] ``log p - log p_initial`` of each completion."""
        import torch

        from toolkit.packing import in_batches

        assert self._initial is not None
        flat = [one for group in completions for one in group]
        found: list[float] = []
        batches = in_batches(
            flat, lambda one: len(one.prompt_token_ids) + len(one.token_ids), self.recipe.train.batch_tokens
        )
        for batch in batches:
            initial = self._initial.logprobs(
                [[*one.prompt_token_ids, *one.token_ids] for one in batch],
                [len(one.token_ids) for one in batch],
                [one.rotary_length for one in batch],
                self.section.rollout.temperature,
            )
            masks = [torch.tensor(getattr(one, "sampled", None) or [True] * len(one.token_ids)) for one in batch]
            found += [
                sum(one.logprobs) - float(values[mask.to(values.device)].sum())
                for one, values, mask in zip(batch, initial, masks)
            ]
        return torch.tensor(found, dtype=torch.float64).reshape(len(completions), -1)
