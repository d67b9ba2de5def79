"""Reward models: a score of each sequence, by which the chosen one of a pair is to be the better."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from toolkit.errors import ToolkitError
from toolkit.training.jsonl import Line, kind_of
from toolkit.training.objectives.base import Metrics, RunContext
from toolkit.training.objectives.pairs import OnPairs, Pair, PairSection, sequences_of
from toolkit.training.preparing import Outcome
from toolkit.training.progress import counted
from toolkit.training.tasks import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.config.schema import Recipe

SUMS = ("pairs", "accuracy", "margin", "reward")


class RewardSection(PairSection):
    """A reward model (Bradley and Terry): the model without its head of tokens, and a head with one output.

    ``data_files``, ``datasets``: lines with ``prompt``, ``chosen`` and ``rejected``, as for ``dpo``; ``margin``, a
    number beside them, is by how much the chosen one is to be better. The checkpoint is one of sequence classification,
    which ``toolkit serve`` opens as a pooling model. A base model's new head has random weights.
    """

    supports_expert_parallel: ClassVar[bool] = False

    kind: Literal["reward"] = "reward"
    center_rewards_coefficient: Annotated[float, Field(ge=0)] | None = None
    """Weight of the squared sum of the two rewards, which pulls their mean to 0 (Eisenstein et al., 2023); null is
    0."""

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        if recipe.export:
            raise ValueError(
                "export must be empty with objective.kind 'reward', whose checkpoints are of transformers' "
                "sequence classification"
            )


class RewardModel(OnPairs[RewardSection]):
    """``-log s(r_chosen - r_rejected - margin)``, s the logistic function, a mean over pairs."""

    primary_metric = "accuracy"
    eval_metric = "eval_accuracy"
    head = "score"

    def check_line(self, line: Mapping[str, Any]) -> None:
        super().check_line(line)
        margin = line.get("margin")
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float))):
            raise ToolkitError(f"must have 'margin' as a number, got {kind_of(margin)}.")

    def bind(self, context: RunContext) -> None:
        from toolkit.training.score_model import check_scores

        super().bind(context)
        with context.gathered():
            check_scores(context.model.model, self.head)

    def prepare(self, source: Problem | Line) -> Outcome:
        outcome = super().prepare(source)
        if isinstance(source, Line):
            for pair in outcome.examples:
                pair.margin = float(source.value.get("margin") or 0.0)
        return outcome

    def loss(self, forward: Callable[..., Any], micro: list[Pair]) -> "Tensor":
        import torch.nn.functional as F

        chosen, rejected = self._rewards(forward, micro)
        margin = chosen.new_tensor([pair.margin for pair in micro])
        losses = -F.logsigmoid(chosen - rejected - margin)
        if self.section.center_rewards_coefficient:
            losses = losses + self.section.center_rewards_coefficient * (chosen + rejected).square()
        self._count(micro, chosen.detach(), rejected.detach())
        return (losses * chosen.new_tensor([pair.weight for pair in micro])).sum()

    @staticmethod
    def _rewards(forward: Callable[..., Any], micro: Sequence[Pair]) -> "tuple[Tensor, Tensor]":
        """(chosen, rejected) [pairs]."""
        scores: Tensor = forward(sequences_of(micro)[0], scores=True)
        return scores[::2], scores[1::2]

    def _count(self, micro: Sequence[Pair], chosen: "Tensor", rejected: "Tensor") -> None:
        real = chosen.new_tensor([float(pair.weight > 0.0) for pair in micro])
        margin = chosen - rejected
        # A tie says nothing: half a point.
        wins = (margin > 0).to(real.dtype) + 0.5 * (margin == 0).to(real.dtype)
        self.sums.add(
            pairs=real.sum().item(),
            accuracy=(wins * real).sum().item(),
            margin=(margin * real).sum().item(),
            reward=((chosen + rejected) * real).sum().item() / 2,
        )

    def finish(self) -> tuple[int, dict[str, float]]:
        return int(self._tokens), self._metrics()

    def _metrics(self) -> dict[str, float]:
        """Means over pairs."""
        got = self.sums.take(self.context)
        pairs = got["pairs"]
        return {
            "accuracy": got["accuracy"] / pairs,
            "margin": got["margin"] / pairs,
            "mean_reward": got["reward"] / pairs,
        }

    def evaluate(self) -> Metrics:
        """The same metrics on held-out pairs; none where a file has too few."""
        import torch

        from toolkit.patching.eval_mode import eval_mode

        mine, total = self.held_out_pairs()
        if not total:
            return {"eval_samples": 0}
        self.sums.add(**dict.fromkeys(SUMS, 0.0))  # a process may have no pair
        micros = self.packed(mine)
        with torch.no_grad(), eval_mode(self.context.model):
            for micro in counted(micros, len(micros), "held out: forwards"):
                self._count(micro, *self._rewards(self.context.model, micro))
        return {"eval_samples": total, **{f"eval_{name}": value for name, value in self._metrics().items()}}

    def show(self, before: Metrics | None, after: Metrics) -> None:
        if after["eval_samples"]:
            start = f"{before['eval_accuracy']:.1%} before, " if before else ""
            print(
                f"held-out pairs, chosen with the higher reward: {start}{after['eval_accuracy']:.1%} after "
                f"({after['eval_samples']} pairs)"
            )
