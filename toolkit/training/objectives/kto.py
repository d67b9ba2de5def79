"""Kahneman-Tversky optimisation: completions with a label, good or bad, relative to a frozen reference."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from toolkit.config.base import Count
from toolkit.config.objective import OfflineSection, Positive
from toolkit.errors import ToolkitError
from toolkit.packing import in_batches
from toolkit.training.formats import PREFERENCE_FORMATS, Format, options, preference, read
from toolkit.training.jsonl import Line, kind_of
from toolkit.training.objectives.base import MetricAccumulator, Metrics, RunContext, divided
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.preparing import Outcome, paired
from toolkit.training.progress import counted
from toolkit.training.tasks import Problem

if TYPE_CHECKING:
    from torch import Tensor


SINGLE: Format = ("prompt", "completion")
SUMS = ("examples", "accuracies", "desirable", "chosen_rewards", "rejected_rewards", "chosen", "rejected")


class KTOSection(OfflineSection):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024). The reference is the initial model (after the warm-up).

    ``data_files``, ``datasets``: lines with ``prompt``, ``completion`` and ``label`` (whether it is desirable), or the
    lines of ``dpo``, each of which gives a desirable and an undesirable completion.
    """

    kind: Literal["kto"] = "kto"
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """apo_zero_unpaired (D'Oosterlinck et al., 2024) compares with the reference alone, kto with the KL beside it."""
    lines: Count = 32
    """Lines per step, over all processes."""
    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0


@dataclass
class Judged:
    """A completion and its label, and the sum of its log-probabilities under the reference."""

    prompt: list[int]
    completion: list[int]
    label: bool
    reference: float = 0.0
    weight: float = 0.0
    """In the loss; 0 for one that only fills a micro-batch."""
    baseline: float = 0.0
    """The KL that its reward is compared with."""

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.completion)


class KTO(OfflineObjective[KTOSection]):
    """``w (1 - s(beta (r - kl)))`` of a desirable completion, ``w (1 - s(beta (kl - r)))`` of another one.

    ``r`` is its log-probability less that of the reference, ``s`` the logistic function. ``kl`` is the mean of ``r``
    over prompts with the completions of their neighbours in the step, at least 0, without gradients.
    """

    primary_metric = "rewards/margins"
    eval_metric = "eval_rewards/accuracies"
    formats = (*PREFERENCE_FORMATS, SINGLE)
    example_type = Judged
    of_task = of_file = "lines"

    def check_line(self, line: Mapping[str, Any]) -> None:
        if len(read(line, self.formats)) == 2 and "chosen" not in line and label_of(line) is None:
            raise ToolkitError(f"must have 'label' as true or false, got {kind_of(line.get('label'))}.")

    def bind(self, context: RunContext) -> None:
        from toolkit.training.reference import Reference

        super().bind(context)
        self.check_data()
        self.stream = self.sources(context)
        self._lines = divided("objective.lines", self.section.lines, context.world_size)
        self.reference: Reference = Reference(context.initial_model(), self.recipe.model, context.device)
        self.sums = MetricAccumulator()

    def prepare(self, source: Problem | Line) -> Outcome:
        if isinstance(source, Problem):
            return self._of_pair(source.prompt, source.solution, source.wrong)
        self.check_line(source.value)
        fields, given = read(source.value, self.formats), options(source.value)
        if "chosen" in fields:
            return self._of_pair(*preference(fields), *given)
        label = bool(label_of(source.value))
        outcome = self._paired(fields["prompt"], fields["completion"], fields["completion"], *given)
        outcome.examples = [Judged(prompt, completion, label) for prompt, completion, _ in outcome.examples]
        both = ("tokens", "counted", "cut_tokens")
        outcome.counts = Counter({name: n // 2 if name in both else n for name, n in outcome.counts.items()})
        return outcome

    def _of_pair(self, *given: Any) -> Outcome:
        outcome = self._paired(*given)
        pairs, outcome.examples = outcome.examples, []
        for prompt, chosen, rejected in pairs:
            outcome.examples += [Judged(prompt, chosen, True), Judged(prompt, rejected, False)]
        outcome.counts["examples"] *= 2
        return outcome

    def _paired(self, *given: Any) -> Outcome:
        """(prompt, completion, completion) of the arguments of ``ChatTokenizer.preference``."""

        def make(*parts: list[int]) -> tuple[list[int], ...]:
            return parts

        return paired(
            self.chat.preference(*given), make, self.recipe.train.max_length, self.section.excess_length_strategy
        )

    def shown(self, example: Judged) -> tuple[list[int], list[bool]]:
        return example.prompt + example.completion, [False] * len(example.prompt) + [True] * len(example.completion)

    @property
    def lines_per_step(self) -> int:
        return self.section.lines

    def updates(self, step: int) -> Iterator[Sequence[list[Judged]]]:
        examples: list[Judged] = [one for _ in range(self._lines) for one in self.next_examples()]
        total, self._tokens = self.context.reduce_sum([len(examples), sum(len(one.completion) for one in examples)])
        micros = self._compared(examples)
        for one in examples:
            one.weight = self.context.world_size / total
        filler = Judged(examples[0].prompt, examples[0].completion[:1], True)
        micros += [[filler] for _ in range(self.context.reduce_max(len(micros)) - len(micros))]
        yield micros

    def _compared(self, examples: Sequence[Judged]) -> list[list[Judged]]:
        """Forwards of ``train.batch_tokens``; every example gets its reference and the baseline of all of them."""
        micros = self._batches(examples)
        for micro in micros:
            for one, value in zip(micro, _sums(self.reference.logprobs(*_sequences(micro)))):
                one.reference = value.item()
        if self.section.loss_type == "kto":
            baseline = self._kl(examples)
            for one in examples:
                one.baseline = baseline
            self.sums.add(kl=baseline / self.context.world_size)
        return micros

    def _batches(self, examples: Sequence[Judged]) -> list[list[Judged]]:
        return in_batches(examples, lambda one: one.tokens, self.recipe.train.batch_tokens)

    def _kl(self, examples: Sequence[Judged]) -> float:
        """The mean over all processes of ``r`` of prompts with other completions, at least 0."""
        import torch

        from toolkit.patching.eval_mode import eval_mode

        most, model = self.recipe.train.max_length, self.context.model
        others = [*examples[-1:], *examples[:-1]]
        mixed = [
            Judged(one.prompt, other.completion[: most - len(one.prompt)], False)
            for one, other in zip(examples, others)
        ]
        total = 0.0
        with self.context.gathered(), torch.no_grad(), eval_mode(model):
            for micro in self._batches(mixed):
                sequences = _sequences(micro)
                ratio = _sums(model(*sequences[:1], last=sequences[1])) - _sums(self.reference.logprobs(*sequences))
                total += ratio.sum().item()
        total, count = self.context.reduce_sum([total, len(mixed)])
        return max(total / max(count, 1), 0.0)

    def loss(self, forward: Callable[..., Any], micro: list[Judged]) -> "Tensor":
        import torch

        section = self.section
        sequences, lengths = _sequences(micro)
        logps = _sums(forward(sequences, last=lengths))
        ratio = logps - logps.new_tensor([one.reference for one in micro])
        desirable = torch.tensor([one.label for one in micro], device=logps.device)
        beyond = ratio - logps.new_tensor([one.baseline for one in micro])
        losses = torch.sigmoid(section.beta * torch.where(desirable, -beyond, beyond))
        weights = [section.desirable_weight if one.label else section.undesirable_weight for one in micro]
        self._count(micro, logps.detach(), ratio.detach())
        return (losses * logps.new_tensor([one.weight * weight for one, weight in zip(micro, weights)])).sum()

    def rows(self, micro: list[Judged]) -> int:
        return sum(one.tokens for one in micro if one.weight)

    def _count(self, micro: list[Judged], logps: "Tensor", ratio: "Tensor") -> None:
        rewards = (self.section.beta * ratio).tolist()
        for one, reward, logp in zip(micro, rewards, logps.tolist()):
            if one.weight:
                beyond = reward - self.section.beta * one.baseline
                right = 0.5 if beyond == 0 else float((beyond > 0) == one.label)  # a tie says nothing
                side = "chosen" if one.label else "rejected"
                self.sums.add(
                    examples=1, accuracies=right, desirable=one.label, **{f"{side}_rewards": reward, side: logp}
                )

    def finish(self) -> tuple[int, dict[str, float]]:
        return int(self._tokens), self._metrics()

    def _metrics(self) -> dict[str, float]:
        self.sums.add(**dict.fromkeys(SUMS, 0.0))  # a process may have none of one label
        got = self.sums.take(self.context)
        counts = {"chosen": got["desirable"], "rejected": got["examples"] - got["desirable"]}
        rewards, logps = (
            {side: got[f"{side}{end}"] / count if count else 0.0 for side, count in counts.items()}
            for end in ("_rewards", "")
        )
        found = {
            "rewards/accuracies": got["accuracies"] / got["examples"],
            "rewards/chosen": rewards["chosen"],
            "rewards/rejected": rewards["rejected"],
            "rewards/margins": rewards["chosen"] - rewards["rejected"],
            "logps/chosen": logps["chosen"],
            "logps/rejected": logps["rejected"],
        }
        return found | ({"kl": got["kl"]} if "kl" in got else {})

    def evaluate(self) -> Metrics:
        """The same metrics on held-out lines; none where a file has too few."""
        import torch

        from toolkit.patching.eval_mode import eval_mode

        context = self.context
        mine, total = self.held_out_examples()
        if not total:
            return {"eval_samples": 0}
        micros = self._compared(mine)
        with torch.no_grad(), eval_mode(context.model):
            for micro in counted(micros, len(micros), "held out: forwards"):
                for one in micro:
                    one.weight = 1.0
                sequences, lengths = _sequences(micro)
                logps = _sums(context.model(sequences, last=lengths))
                self._count(micro, logps, logps - logps.new_tensor([one.reference for one in micro]))
        return {"eval_samples": total, **{f"eval_{name}": value for name, value in self._metrics().items()}}

    def show(self, before: Metrics | None, after: Metrics) -> None:
        if after["eval_samples"]:
            name = "eval_rewards/accuracies"
            start = f"{before[name]:.1%} before, " if before else ""
            print(
                f"held-out completions, reward on the side of the label: {start}{after[name]:.1%} after "
                f"({after['eval_samples']} completions)"
            )


def label_of(line: Mapping[str, Any]) -> bool | None:
    """A line's label, from true, false, 0 or 1; None for anything else."""
    value = line.get("label")
    return bool(value) if value in (0, 1) and not isinstance(value, (str, float)) else None


def _sequences(micro: Sequence[Judged]) -> tuple[list[list[int]], list[int]]:
    """Sequences, and how many of their last tokens are completions."""
    return [one.prompt + one.completion for one in micro], [len(one.completion) for one in micro]


def _sums(logprobs: "Sequence[Tensor]") -> "Tensor":
    """[examples] sums of the completions' log-probabilities."""
    import torch

    return torch.stack([values.sum() for values in logprobs])
