"""The entropy of a policy's tokens in its loss: a bonus, its coefficient, and the tokens with most of it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.training.objectives.grpo_section import GRPOSection

if TYPE_CHECKING:
    from toolkit.training.objectives.base import RunContext


class EntropyTerm:
    """``-entropy_coef mean H`` over the tokens of an update, or those of ``top_entropy_quantile``; as TRL's GRPO.

    Attributes:
        coefficient: which ``use_adaptive_entropy`` moves.
        measured: mean entropy in nats of those tokens in the last update; None before the first.
    """

    def __init__(self, section: GRPOSection) -> None:
        self._section = section
        self.coefficient: float = section.entropy_coef
        self.measured: float | None = None
        self._total = self._count = 0.0

    @property
    def wanted(self) -> bool:
        """Whether the loss needs entropies."""
        section = self._section
        return bool(section.entropy_coef or section.use_adaptive_entropy or section.top_entropy_quantile < 1.0)

    @property
    def _applied(self) -> float:
        if not self._section.use_adaptive_entropy:
            return self.coefficient
        low = self.measured is not None and self.measured <= self._section.entropy_target
        return self.coefficient if low else 0.0

    def selected(self, entropy: Tensor, counted: Tensor, context: "RunContext") -> Tensor:
        """[T] 1 for the tokens with the highest entropy in this forward of all processes, 0 for others.

        Args:
            entropy: [T], nats.
            counted: [T] 1, or 0 for tokens that are padding.
        """
        if self._section.top_entropy_quantile == 1.0:
            return counted
        own = entropy.detach()[counted > 0].tolist()
        known = torch.tensor([value for values in context.gather_objects(own) for value in values], dtype=entropy.dtype)
        if not len(known):
            return torch.zeros_like(counted)
        threshold = torch.quantile(known, 1.0 - self._section.top_entropy_quantile)
        return counted * (entropy.detach() >= threshold.to(entropy.device))

    def loss(self, entropy: Tensor, selected: Tensor, share: float) -> Tensor:
        """A micro-batch's part of the term.

        Args:
            entropy: [T], nats.
            selected: [T] 1 for the tokens that it is of, 0 for others.
            share: of the update's tokens that the micro-batch has.
        """
        total, count = (entropy * selected).sum(), selected.sum()
        self._total += total.item()
        self._count += count.item()
        return -self._applied * share * total / count.clamp(min=1.0)

    def finish_update(self, context: "RunContext") -> None:
        """After an optimizer update; all processes must call it."""
        total, count = context.reduce_sum([self._total, self._count])
        self._total = self._count = 0.0
        if not count:
            return
        self.measured, section = total / count, self._section
        if section.use_adaptive_entropy:
            delta = section.entropy_coef_delta
            moved = self.coefficient + (delta if self.measured <= section.entropy_target else -delta)
            self.coefficient = min(max(moved, section.entropy_coef_min), section.entropy_coef_max)

    def metrics(self) -> dict[str, float]:
        """The mean entropy, and the coefficient of the next update."""
        measured = {} if self.measured is None else {"entropy": self.measured}
        return {**measured, "entropy_coef": self.coefficient} if self.wanted else {}

    def state_dict(self) -> dict[str, Any]:
        """What a run that resumes needs, as JSON."""
        return {"coefficient": self.coefficient, "measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.coefficient, self.measured = state["coefficient"], state["measured"]
