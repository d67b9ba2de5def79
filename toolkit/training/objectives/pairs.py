"""What objectives on pairs of completions share: they are side by side in a batch and share their prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from toolkit.config.base import Count
from toolkit.config.objective import OfflineSection
from toolkit.packing import in_batches
from toolkit.training.formats import PREFERENCE_FORMATS, options, preference, read
from toolkit.training.jsonl import Line
from toolkit.training.objectives.base import MetricAccumulator, RunContext, divided
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.preparing import Outcome, paired
from toolkit.training.tasks import Problem


class PairSection(OfflineSection):
    """Objectives on pairs. ``data_files``, ``datasets``: lines with ``prompt``, ``chosen`` and ``rejected``.

    They are texts or messages; without ``prompt`` it is what both completions begin with. ``tools`` and
    ``chat_template_kwargs`` beside messages are given to the chat template.
    """

    pairs: Count = 32
    """Pairs per step, over all processes."""


P = TypeVar("P", bound=PairSection)


@dataclass
class Pair:
    """Two completions of one prompt, and the sums of their log-probabilities under the reference."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float] = (0.0, 0.0)
    margin: float = 0.0
    """By how much the chosen one is better, where a line says so."""
    weight: float = 0.0
    """In the loss; 0 for a pair that only fills a micro-batch."""
    token_weight: float = 0.0
    """Of each token in a loss that is a mean over the tokens of all pairs."""

    @property
    def tokens(self) -> int:
        """A bound of what a forward computes for it."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class OnPairs(OfflineObjective[P]):
    """Pairs of a task (a right and a wrong completion) or of lines."""

    formats = PREFERENCE_FORMATS
    example_type = Pair
    of_task = of_file = "pairs"

    def bind(self, context: RunContext) -> None:
        super().bind(context)
        self.check_data()
        self.stream = self.sources(context)
        self._pairs = divided("objective.pairs", self.section.pairs, context.world_size)
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
        while len(pairs) < count:
            pairs += self.next_examples()
        return pairs

    @property
    def lines_per_step(self) -> int:
        return self.section.pairs

    def updates(self, step: int) -> Iterator[Sequence[list[Pair]]]:
        pairs = self._take(self._pairs)
        self.weigh(pairs)
        micros = self.packed(pairs)
        count = self.context.reduce_max(len(micros))
        filler = Pair(pairs[0].prompt, pairs[0].chosen[:1], pairs[0].rejected[:1])
        micros += [[filler] for _ in range(count - len(micros))]
        (self._tokens,) = self.context.reduce_sum([sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)])
        yield micros

    def weigh(self, pairs: Sequence[Pair]) -> None:
        """Give the pairs of a step, those of this process, their weights in the loss."""
        for pair in pairs:
            pair.weight = self.context.world_size / self.section.pairs

    def packed(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """Pairs in forwards of ``train.batch_tokens``."""
        return in_batches(pairs, lambda pair: pair.tokens, self.recipe.train.batch_tokens)

    def rows(self, micro: list[Pair]) -> int:
        return sum(pair.tokens + len(pair.prompt) for pair in micro if pair.weight)

    def held_out_pairs(self) -> tuple[list[Pair], int]:
        """This process's held-out pairs, and how many all have; none where there are too few lines."""
        mine, total = self.held_out_examples()
        for pair in mine:
            pair.weight = 1.0
        return mine, total


def sequences_of(micro: Sequence[Pair]) -> tuple[list[list[int]], list[int]]:
    """Both sequences of each pair, side by side, and how many of their last tokens are completions."""
    sequences = [pair.prompt + completion for pair in micro for completion in (pair.chosen, pair.rejected)]
    return sequences, [len(completion) for pair in micro for completion in (pair.chosen, pair.rejected)]
