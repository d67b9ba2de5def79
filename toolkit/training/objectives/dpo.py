"""Direct preference optimisation: pairs side by side in a batch, so that their prompt is computed once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from toolkit.config import Recipe
from toolkit.config.objective import DpoObjective
from toolkit.errors import ToolkitError
from toolkit.patching.eval_mode import eval_mode
from toolkit.training.examples import completion_ids, in_batches, prompt_ids
from toolkit.training.model import Reference
from toolkit.training.objectives.base import MetricAccumulator, RunContext, divided
from toolkit.training.objectives.functions import preference_loss
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.tasks import Problem, ProblemStream


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


class Preference(OfflineObjective):
    """Pairs of a task (a right and a wrong answer) or of a file. The reference is a frozen copy."""

    headline = "accuracy"
    fields = ({"prompt": str, "chosen": str, "rejected": str},)
    of_task = of_file = "pairs"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.section = cast(DpoObjective, recipe.objective)

    @staticmethod
    def text_of(line: dict[str, Any]) -> str:
        return line["prompt"] + line["chosen"] + line["rejected"]

    def bind(self, setting: RunContext) -> None:
        super().bind(setting)
        self.stream = self.sources(setting)
        self._pairs = divided("objective.pairs", self.section.pairs, setting.world)
        self.reference = Reference(setting.found(), self.recipe.model, setting.device)
        self.sums = MetricAccumulator()

    def pair(self, source: Problem | dict[str, Any]) -> Pair:
        """The tokens of a problem's two answers, or of a line."""
        tokenizer, longest = self.setting.tokenizer, self.recipe.train.max_length
        if isinstance(source, Problem):
            prompt, chosen, rejected = source.prompt, source.solution, source.wrong
        else:
            prompt, chosen, rejected = source["prompt"], source["chosen"], source["rejected"]
        ids = prompt_ids(tokenizer, prompt)
        if len(ids) >= longest:
            raise ToolkitError(
                f"a prompt has {len(ids)} tokens; with train.max_length {longest} it must have fewer, or nothing of "
                "its answers is left."
            )
        room = longest - len(ids)
        return Pair(ids, completion_ids(tokenizer, chosen)[:room], completion_ids(tokenizer, rejected)[:room])

    def updates(self, step: int) -> Iterator[Sequence[list[Pair]]]:
        pairs = [self.pair(source) for source in self.stream.take(self._pairs)]
        for pair in pairs:
            pair.weight = self.setting.world / self.section.pairs
        micros = self._packed(pairs)
        count = self.setting.largest(len(micros))
        filler = Pair(pairs[0].prompt, pairs[0].chosen[:1], pairs[0].rejected[:1])
        micros += [[filler] for _ in range(count - len(micros))]
        (self._tokens,) = self.setting.total([sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)])
        yield micros

    def _packed(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """Pairs in forwards of ``train.batch_tokens``, with the reference's opinion of them."""
        micros = in_batches(pairs, lambda pair: pair.tokens, self.recipe.train.batch_tokens)
        for micro in micros:
            chosen, rejected, _ = _scores(self.reference.logprobs(*_sequences(micro)))
            for pair, one, other in zip(micro, chosen.tolist(), rejected.tolist()):
                pair.reference = one, other
        return micros

    def loss(self, forward: Callable[..., Any], micro: list[Pair]) -> Tensor:
        sequences, lengths = _sequences(micro)
        chosen, rejected, tokenwise = _scores(forward(sequences, last=lengths))
        weight = chosen.new_tensor([pair.weight for pair in micro])
        references = chosen.new_tensor([pair.reference for pair in micro])
        loss = preference_loss(chosen, rejected, references[:, 0], references[:, 1], beta=self.section.beta)
        self._count(micro, chosen.detach(), rejected.detach(), references)
        if self.section.sft_weight:
            loss = loss - self.section.sft_weight * tokenwise
        return (loss * weight).sum()

    def rows(self, micro: list[Pair]) -> int:
        return sum(pair.tokens + len(pair.prompt) for pair in micro if pair.weight)

    def _count(self, micro: list[Pair], chosen: Tensor, rejected: Tensor, references: Tensor) -> None:
        margin = (chosen - references[:, 0]) - (rejected - references[:, 1])
        real = chosen.new_tensor([float(pair.weight > 0.0) for pair in micro])
        # A tie says nothing: half a point, so that the untrained model has 50 %.
        wins = (margin > 0).to(real.dtype) + 0.5 * (margin == 0).to(real.dtype)
        self.sums.add(
            pairs=real.sum().item(),
            accuracy=(wins * real).sum().item(),
            margin=(self.section.beta * margin * real).sum().item(),
            preferred=((chosen > rejected) * real).sum().item(),
            chosen=(chosen * real).sum().item(),
            rejected=(rejected * real).sum().item(),
        )

    def finish(self) -> tuple[int, dict[str, float]]:
        return int(self._tokens), self._figures()

    def _figures(self) -> dict[str, float]:
        """Means a pair: the margin in units of the loss, how often it is above 0, and the log-probabilities."""
        got = self.sums.take(self.setting)
        pairs = got.pop("pairs")
        return {
            "accuracy": got["accuracy"] / pairs,
            "margin": got["margin"] / pairs,
            "preferred": got["preferred"] / pairs,
            "logprob_chosen": got["chosen"] / pairs,
            "logprob_rejected": got["rejected"] / pairs,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """The same figures on held-out pairs; empty where a file has none."""
        evaluation, setting = self.section.evaluation, self.setting
        if self.task is not None:
            sources: Sequence[Any] = ProblemStream(self.task, 0, evaluation.held_out, held_out=True).take(
                evaluation.problems
            )
        else:
            assert self.lines is not None
            sources = self.lines.held_out[: evaluation.problems]
        if len(sources) < setting.world:
            return {"pairs": 0}
        mine = [self.pair(source) for source in sources[setting.rank :: setting.world]]
        for pair in mine:
            pair.weight = 1.0
        with eval_mode(setting.model):
            for micro in self._packed(mine):
                sequences, lengths = _sequences(micro)
                chosen, rejected, _ = _scores(setting.model(sequences, last=lengths))
                self._count(micro, chosen, rejected, chosen.new_tensor([pair.reference for pair in micro]))
        return {"pairs": len(sources), **self._figures()}

    def show(self, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
        if after["pairs"]:
            for name, what in (("accuracy", "margin above 0"), ("preferred", "right answer likelier than the wrong")):
                start = f"{before[name]:.1%} before, " if before else ""
                print(f"held-out pairs, {what}: {start}{after[name]:.1%} after ({after['pairs']} pairs)")


def _sequences(micro: Sequence[Pair]) -> tuple[list[list[int]], list[int]]:
    """Both sequences of each pair, side by side, and how many of their last tokens are completions."""
    sequences = [pair.prompt + completion for pair in micro for completion in (pair.chosen, pair.rejected)]
    return sequences, [len(completion) for pair in micro for completion in (pair.chosen, pair.rejected)]


def _scores(logprobs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen, rejected, mean a token of chosen) [pairs]: sums of the completions' log-probabilities."""
    chosen, rejected = (torch.stack([values.sum() for values in side]) for side in (logprobs[::2], logprobs[1::2]))
    return chosen, rejected, torch.stack([values.mean() for values in logprobs[::2]])
