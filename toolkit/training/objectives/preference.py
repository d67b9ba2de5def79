"""What objectives on preferences share: losses on the log-probabilities of the two completions of a pair."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from toolkit.config.objective import Positive, SyncedReferenceSection
from toolkit.training.objectives.base import Metrics, RunContext
from toolkit.training.objectives.pairs import OnPairs, Pair, PairSection, sequences_of
from toolkit.training.progress import counted

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.training.preference_losses import Scores
    from toolkit.training.readings import Reading
    from toolkit.training.reference import Reference


SUMS = ("pairs", "accuracies", "margins", "preferred", "chosen", "rejected")


class PreferenceSection(PairSection):
    """Objectives on the log-probabilities of pairs; lines as ``PairSection`` says."""

    beta: Positive = 0.1


P = TypeVar("P", bound=PreferenceSection)


class Preference(OnPairs[P]):
    """Pairs, and a loss on their log-probabilities.

    Attributes:
        has_reference: whether losses compare with a frozen copy of the initial model (after the warm-up).
        reference: that copy.
    """

    primary_metric = "rewards/accuracies"
    eval_metric = "eval_rewards/accuracies"
    has_reference: ClassVar[bool] = False
    reference: "Reference | None" = None

    def bind(self, context: RunContext) -> None:
        from toolkit.training.reference import Reference, ReferenceSync

        super().bind(context)
        if self.has_reference:
            self.reference = Reference(context.initial_model(), self.recipe.model, context.device)
            if isinstance(self.section, SyncedReferenceSection) and self.section.sync_ref_model:
                self.synced = ReferenceSync(self.section, self.reference, context)

    def weigh(self, pairs: Sequence[Pair]) -> None:
        super().weigh(pairs)
        (total,) = self.context.reduce_sum([sum(map(self.supervised_tokens, pairs))])
        for pair in pairs:
            pair.token_weight = self.context.world_size / total

    def supervised_tokens(self, pair: Pair) -> int:
        """Tokens of a pair that ``cross_entropy`` is over."""
        return len(pair.chosen)

    def packed(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """Pairs in forwards of ``train.batch_tokens``, with the reference's log-probabilities of them."""
        micros = super().packed(pairs)
        if self.reference is None:
            return micros
        for micro in micros:
            chosen, rejected = self._logps(self.reference.logprobs(*sequences_of(micro)))
            for pair, one, other in zip(micro, chosen.tolist(), rejected.tolist()):
                pair.reference = one, other
        return micros

    def loss(self, forward: Callable[..., Any], micro: list[Pair]) -> "Tensor":
        from toolkit.training.preference_losses import Scores

        sequences, lengths = sequences_of(micro)
        logprobs, *read = forward(sequences, last=self.predicted(micro, lengths), reading=self.reading())
        of_completions = [values[len(values) - count :] for values, count in zip(logprobs, lengths)]
        chosen, rejected = self._logps(of_completions)
        weight = chosen.new_tensor([pair.weight for pair in micro])
        references = chosen.new_tensor([pair.reference for pair in micro])
        lengths_of = chosen.new_tensor([(len(pair.chosen), len(pair.rejected)) for pair in micro])
        scores = Scores(chosen, rejected, *references.unbind(1), *lengths_of.unbind(1))
        losses = self.preference_loss(scores)
        for collisions in read:
            losses = losses * _confidence(of_completions, collisions)
        loss = (losses * weight).sum()
        self._count(micro, chosen.detach(), rejected.detach(), references)
        supervised = self.supervised_weight()
        return loss + supervised * self.cross_entropy(micro, logprobs[::2]) if supervised else loss

    @property
    def longer_weight(self) -> float:
        """Of the tokens by which one completion of a pair is longer than the other."""
        return 1.0

    def _logps(self, logprobs: "Sequence[Tensor]") -> "tuple[Tensor, Tensor]":
        """(chosen, rejected) [pairs]: sums of the completions' log-probabilities."""
        import torch

        sides = logprobs[::2], logprobs[1::2]
        if self.longer_weight != 1.0:
            shared = [min(len(one), len(other)) for one, other in zip(*sides)]
            sums = [
                torch.stack(
                    [values[:n].sum() + self.longer_weight * values[n:].sum() for values, n in zip(side, shared)]
                )
                for side in sides
            ]
        else:
            sums = [torch.stack([values.sum() for values in side]) for side in sides]
        return sums[0], sums[1]

    def reading(self) -> "Reading":
        """What the loss reads of logits: log-probabilities, and collisions to weigh pairs by how probable they are."""
        from toolkit.training.readings import Reading

        return Reading()

    def predicted(self, micro: Sequence[Pair], lengths: list[int]) -> list[int]:
        """How many last tokens of each sequence the loss reads; the completions have ``lengths``."""
        return lengths

    @abstractmethod
    def preference_loss(self, scores: "Scores") -> "Tensor":
        """[pairs] losses."""

    def supervised_weight(self) -> float:
        """The weight of ``cross_entropy`` beside the preference."""
        return 0.0

    def cross_entropy(self, micro: Sequence[Pair], logprobs: "Sequence[Tensor]") -> "Tensor":
        """The micro-batch's part of the chosen completions' cross-entropy, a mean over their tokens in the step."""
        import torch

        return -torch.stack([values.sum() * pair.token_weight for pair, values in zip(micro, logprobs)]).sum()

    def _count(self, micro: list[Pair], chosen: "Tensor", rejected: "Tensor", references: "Tensor") -> None:
        margin = (chosen - references[:, 0]) - (rejected - references[:, 1])
        real = chosen.new_tensor([float(pair.weight > 0.0) for pair in micro])
        # A tie says nothing: half a point, so that the untrained model has 50 %.
        wins = (margin > 0).to(real.dtype) + 0.5 * (margin == 0).to(real.dtype)
        self.sums.add(
            pairs=real.sum().item(),
            accuracies=(wins * real).sum().item(),
            margins=(self.section.beta * margin * real).sum().item(),
            preferred=((chosen > rejected) * real).sum().item(),
            chosen=(chosen * real).sum().item(),
            rejected=(rejected * real).sum().item(),
        )

    def finish(self) -> tuple[int, dict[str, float]]:
        return int(self._tokens), self._metrics()

    def _metrics(self) -> dict[str, float]:
        """Means over pairs: the margin in units of the loss, how often it is above 0, and the log-probabilities."""
        got = self.sums.take(self.context)
        pairs = got.pop("pairs")
        return {
            "rewards/accuracies": got["accuracies"] / pairs,
            "rewards/margins": got["margins"] / pairs,
            "logps/accuracies": got["preferred"] / pairs,
            "logps/chosen": got["chosen"] / pairs,
            "logps/rejected": got["rejected"] / pairs,
        }

    def evaluate(self) -> Metrics:
        """The same metrics on held-out pairs; none where a file has too few."""
        import torch

        from toolkit.patching.eval_mode import eval_mode

        context = self.context
        mine, total = self.held_out_pairs()
        if not total:
            return {"eval_samples": 0}
        self.sums.add(**dict.fromkeys(SUMS, 0.0))  # a process may have no pair
        micros = self.packed(mine)
        with torch.no_grad(), eval_mode(context.model):
            for micro in counted(micros, len(micros), "held out: forwards"):
                sequences, lengths = sequences_of(micro)
                chosen, rejected = self._logps(context.model(sequences, last=lengths))
                self._count(micro, chosen, rejected, chosen.new_tensor([pair.reference for pair in micro]))
        return {"eval_samples": total, **{f"eval_{name}": value for name, value in self._metrics().items()}}

    def show(self, before: Metrics | None, after: Metrics) -> None:
        if after["eval_samples"]:
            for name, what in (
                ("eval_rewards/accuracies", "margin above 0"),
                ("eval_logps/accuracies", "chosen more probable than rejected"),
            ):
                start = f"{before[name]:.1%} before, " if before else ""
                print(f"held-out pairs, {what}: {start}{after[name]:.1%} after ({after['eval_samples']} pairs)")


def _confidence(logprobs: "Sequence[Tensor]", collisions: "Sequence[Tensor]") -> "Tensor":
    """[pairs] the product of both completions' ``exp mean(log p - log sum_v p_v^2)``, without gradient.

    Args:
        logprobs: of the tokens of chosen and rejected completions in turn.
        collisions: likewise.
    """
    import torch

    means = torch.stack([(one.detach() - other).mean() for one, other in zip(logprobs, collisions)])
    return (means[::2] + means[1::2]).exp()
