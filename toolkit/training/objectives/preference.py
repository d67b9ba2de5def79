"""What objectives on preferences share: pairs side by side in a batch, so that their prompt is computed once."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from toolkit.config.base import Count
from toolkit.config.objective import OfflineSection, Positive
from toolkit.packing import in_batches
from toolkit.training.examples import check_misses
from toolkit.training.formats import PREFERENCE_FORMATS, options, preference, read
from toolkit.training.jsonl import Line
from toolkit.training.objectives.base import MetricAccumulator, Metrics, RunContext, divided
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.preparing import Outcome, paired
from toolkit.training.tasks import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.training.model import Reference
    from toolkit.training.preference_losses import Scores


SUMS = ("pairs", "accuracies", "margins", "preferred", "chosen", "rejected")


class PreferenceSection(OfflineSection):
    """Objectives on pairs. ``data_files``, ``datasets``: lines with ``prompt``, ``chosen`` and ``rejected``.

    They are texts or messages; without ``prompt`` it is what both completions begin with. ``tools`` and
    ``chat_template_kwargs`` beside messages are given to the chat template.
    """

    pairs: Count = 32
    """Pairs per step, over all processes."""
    beta: Positive = 0.1


P = TypeVar("P", bound=PreferenceSection)


@dataclass
class Pair:
    """Two completions of one prompt, and the sums of their log-probabilities under the reference."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float] = (0.0, 0.0)
    weight: float = 0.0
    """In the loss; 0 for a pair that only fills a micro-batch."""

    @property
    def tokens(self) -> int:
        """A bound of what a forward computes for it."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class Preference(OfflineObjective[P]):
    """Pairs of a task (a right and a wrong completion) or of a file.

    Attributes:
        has_reference: whether losses compare with a frozen copy of the initial model (after the warm-up).
        reference: that copy.
    """

    primary_metric = "rewards/accuracies"
    has_reference: ClassVar[bool] = False
    reference: "Reference | None" = None
    formats = PREFERENCE_FORMATS
    of_task = of_file = "pairs"

    def bind(self, context: RunContext) -> None:
        from toolkit.training.model import Reference

        super().bind(context)
        self.check_data()
        self.stream = self.sources(context)
        self._pairs = divided("objective.pairs", self.section.pairs, context.world_size)
        if self.has_reference:
            self.reference = Reference(context.initial_model(), self.recipe.model, context.device)
        self.sums = MetricAccumulator()

    def prepare(self, source: Problem | Line) -> Outcome:
        if isinstance(source, Problem):
            tokens = self.chat.preference(source.prompt, source.solution, source.wrong)
        else:
            tokens = self.chat.preference(*preference(read(source.value, self.formats)), *options(source.value))
        return paired(tokens, Pair, self.recipe.train.max_length, self.section.excess_length_strategy)

    def shown(self, example: Pair) -> tuple[list[int], list[bool]]:
        return example.prompt + example.chosen, [False] * len(example.prompt) + [True] * len(example.chosen)

    def _take(self, count: int) -> list[Pair]:
        """The next pairs; sources that give none are passed over."""
        pairs: list[Pair] = []
        misses = 0
        while len(pairs) < count:
            found = self.examples(self.stream.take(1)[0])
            misses = 0 if found else misses + 1
            check_misses(misses)
            pairs += found
        return pairs

    @property
    def lines_per_step(self) -> int:
        return self.section.pairs

    def updates(self, step: int) -> Iterator[Sequence[list[Pair]]]:
        pairs = self._take(self._pairs)
        for pair in pairs:
            pair.weight = self.context.world_size / self.section.pairs
        micros = self._packed(pairs)
        count = self.context.reduce_max(len(micros))
        filler = Pair(pairs[0].prompt, pairs[0].chosen[:1], pairs[0].rejected[:1])
        micros += [[filler] for _ in range(count - len(micros))]
        (self._tokens,) = self.context.reduce_sum([sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)])
        yield micros

    def _packed(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """Pairs in forwards of ``train.batch_tokens``, with the reference's log-probabilities of them."""
        micros = in_batches(pairs, lambda pair: pair.tokens, self.recipe.train.batch_tokens)
        if self.reference is None:
            return micros
        for micro in micros:
            chosen, rejected, _ = _logps(self.reference.logprobs(*_sequences(micro)))
            for pair, one, other in zip(micro, chosen.tolist(), rejected.tolist()):
                pair.reference = one, other
        return micros

    def loss(self, forward: Callable[..., Any], micro: list[Pair]) -> "Tensor":
        from toolkit.training.preference_losses import Scores

        sequences, lengths = _sequences(micro)
        chosen, rejected, tokenwise = _logps(forward(sequences, last=lengths))
        weight = chosen.new_tensor([pair.weight for pair in micro])
        references = chosen.new_tensor([pair.reference for pair in micro])
        lengths_of = chosen.new_tensor([(len(pair.chosen), len(pair.rejected)) for pair in micro])
        scores = Scores(chosen, rejected, *references.unbind(1), *lengths_of.unbind(1))
        loss = self.preference_loss(scores) - self.supervised_weight() * tokenwise
        self._count(micro, chosen.detach(), rejected.detach(), references)
        return (loss * weight).sum()

    @abstractmethod
    def preference_loss(self, scores: "Scores") -> "Tensor":
        """[pairs] losses."""

    def supervised_weight(self) -> float:
        """The weight of the chosen completion's cross-entropy, a mean over its tokens, beside the preference."""
        return 0.0

    def rows(self, micro: list[Pair]) -> int:
        return sum(pair.tokens + len(pair.prompt) for pair in micro if pair.weight)

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
        sources = self.held_out_sources()
        if len(sources) < context.world_size:
            return {"eval_samples": 0}
        mine = [pair for source in sources[context.rank :: context.world_size] for pair in self.examples(source)]
        (total,) = context.reduce_sum([len(mine)])
        if not total:
            return {"eval_samples": 0}
        for pair in mine:
            pair.weight = 1.0
        self.sums.add(**dict.fromkeys(SUMS, 0.0))  # a process may have no pair
        with torch.no_grad(), eval_mode(context.model):
            for micro in self._packed(mine):
                sequences, lengths = _sequences(micro)
                chosen, rejected, _ = _logps(context.model(sequences, last=lengths))
                self._count(micro, chosen, rejected, chosen.new_tensor([pair.reference for pair in micro]))
        return {"eval_samples": int(total), **{f"eval_{name}": value for name, value in self._metrics().items()}}

    def show(self, before: Metrics | None, after: Metrics) -> None:
        if after["eval_samples"]:
            for name, what in (
                ("eval_rewards/accuracies", "margin above 0"),
                ("eval_logps/accuracies", "chosen more probable than rejected"),
            ):
                start = f"{before[name]:.1%} before, " if before else ""
                print(f"held-out pairs, {what}: {start}{after[name]:.1%} after ({after['eval_samples']} pairs)")


def _sequences(micro: Sequence[Pair]) -> tuple[list[list[int]], list[int]]:
    """Both sequences of each pair, side by side, and how many of their last tokens are completions."""
    sequences = [pair.prompt + completion for pair in micro for completion in (pair.chosen, pair.rejected)]
    return sequences, [len(completion) for pair in micro for completion in (pair.chosen, pair.rejected)]


def _logps(logprobs: "Sequence[Tensor]") -> "tuple[Tensor, Tensor, Tensor]":
    """(chosen, rejected, mean per token of chosen) [pairs]: sums of the completions' log-probabilities."""
    import torch

    chosen, rejected = (torch.stack([values.sum() for values in side]) for side in (logprobs[::2], logprobs[1::2]))
    return chosen, rejected, torch.stack([values.mean() for values in logprobs[::2]])
