"""Process reward models: two classes for each step of a solution, right or wrong."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from toolkit.chat.tokens import encode
from toolkit.config.base import Count
from toolkit.config.objective import OfflineSection
from toolkit.ops import IGNORED
from toolkit.packing import in_batches
from toolkit.training.formats import Stepwise, stepwise
from toolkit.training.jsonl import Line
from toolkit.training.objectives.base import MetricAccumulator, Metrics, RunContext, divided
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.preparing import Outcome, TooLong
from toolkit.training.progress import counted
from toolkit.training.tasks import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.config.schema import Recipe

SUMS = ("steps", "loss", "accuracy", "right")


class PRMSection(OfflineSection):
    """A process reward model (Lightman et al., 2023); fields have the names of TRL's ``PRMConfig``.

    ``data_files``, ``datasets``: lines with ``prompt``, a text, ``completions``, the texts of the steps, and
    ``labels``, for each whether it is right. The checkpoint is one of token classification, which ``toolkit serve``
    opens as a pooling model: the classes of a step are those of the last token of its separator. A base model's new
    head has random weights.
    """

    supports_expert_parallel: ClassVar[bool] = False

    kind: Literal["prm"] = "prm"
    lines: Count = 32
    """Lines per step, over all processes."""
    step_separator: str = "\n"
    """Ends every step; the step's label is that of its last token."""
    train_on_last_step_only: bool = False
    """Of a line only its last label counts in the loss; held-out measures are of all."""
    max_prompt_length: Count | None = None
    """Tokens of a prompt that are kept, its last ones; null keeps all."""

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        if recipe.export:
            raise ValueError(
                "export must be empty with objective.kind 'prm', whose checkpoints are of transformers' token "
                "classification"
            )
        if not self.step_separator:
            raise ValueError("objective.step_separator must be a text that a step ends with, got ''")


@dataclass
class Steps:
    """A solution, and a class (1 right, 0 wrong) for the token that ends each step, -100 for all others."""

    ids: list[int]
    labels: list[int]
    cut: bool = False
    """Whether its last step is left out."""
    weight: float = 0.0
    """Of each of its labels in the loss; 0 for one that only fills a micro-batch."""

    def classes(self, last_only: bool = False) -> list[int]:
        """The labels that count."""
        if not last_only:
            return self.labels
        last = max((at for at, label in enumerate(self.labels) if label != IGNORED), default=-1)
        return [label if at == last and not self.cut else IGNORED for at, label in enumerate(self.labels)]

    def counted(self, last_only: bool = False) -> int:
        """How many."""
        return sum(label != IGNORED for label in self.classes(last_only))


class PRM(OfflineObjective[PRMSection]):
    """``-log p(label)`` of the tokens that end a step, a mean over the labels of an optimizer step."""

    primary_metric = "accuracy"
    eval_metric = "eval_accuracy"
    head = "token_classes"
    formats = (Stepwise._fields,)
    example_type = Steps
    of_task = of_file = "lines"

    def fields(self, line: Mapping[str, Any]) -> dict[str, Any]:
        given = stepwise(line)
        return {"prompt": given.prompt, "completion": "".join(map(self._ended, given.completions))}

    def _ended(self, step: str) -> str:
        return step + self.section.step_separator

    def bind(self, context: RunContext) -> None:
        from toolkit.training.score_model import check_scores

        super().bind(context)
        with context.gathered():
            check_scores(context.model.model, self.head)
        self.check_data()
        self.stream = self.sources(context)
        self._lines = divided("objective.lines", self.section.lines, context.world_size)
        self.sums = MetricAccumulator()

    def prepare(self, source: Problem | Line) -> Outcome:
        if isinstance(source, Line):
            return self._tokenised(stepwise(source.value))
        sides = [self._tokenised(Stepwise(source.prompt, [source.solution], [True]))]
        sides.append(self._tokenised(Stepwise(source.prompt, [source.wrong], [False])))
        return Outcome([one for side in sides for one in side.examples], sides[0].counts + sides[1].counts)

    def _tokenised(self, given: Stepwise) -> Outcome:
        """Prompt and steps are tokenised one by one, as TRL does, so that a step's last token is its separator's."""
        section, most, tokenizer = self.section, self.recipe.train.max_length, self.context.tokenizer
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        prompt = [*start, *encode(tokenizer, given.prompt)]
        if section.max_prompt_length is not None:
            prompt = prompt[-section.max_prompt_length :]
        separator = encode(tokenizer, section.step_separator)
        steps = [[*encode(tokenizer, step), *separator] for step in given.completions]
        ids = [*prompt, *chain.from_iterable(steps)]
        labels = [IGNORED] * len(prompt)
        for step, label in zip(steps, given.labels):
            labels += [*[IGNORED] * (len(step) - 1), int(label)]
        excess = max(len(ids) - most, 0)
        if excess and section.excess_length_strategy == "raise":
            raise TooLong(f"must have <= {most} tokens (train.max_length), got {len(ids)}.")
        made = Steps(ids[:most], labels[:most], cut=excess > 0)
        counted = made.counted(section.train_on_last_step_only)
        if not counted or (excess and section.excess_length_strategy == "drop"):
            return Outcome(counts=Counter(["too_long" if excess else "empty"]))
        counts = Counter(examples=1, tokens=len(made.ids), counted=counted, cut=excess > 0, cut_tokens=excess)
        return Outcome([made], counts)

    def shown(self, example: Steps) -> tuple[list[int], list[bool]]:
        return example.ids, [one != IGNORED for one in example.classes(self.section.train_on_last_step_only)]

    @property
    def lines_per_step(self) -> int:
        return self.section.lines

    def updates(self, step: int) -> Iterator[Sequence[list[Steps]]]:
        examples: list[Steps] = [one for _ in range(self._lines) for one in self.next_examples()]
        last_only = self.section.train_on_last_step_only
        labels, self._tokens = self.context.reduce_sum(
            [sum(one.counted(last_only) for one in examples), sum(len(one.ids) for one in examples)]
        )
        for one in examples:
            one.weight = self.context.world_size / labels
        micros = self._batches(examples)
        filler = Steps(examples[0].ids[:1], [0])
        micros += [[filler] for _ in range(self.context.reduce_max(len(micros)) - len(micros))]
        yield micros

    def _batches(self, examples: Sequence[Steps]) -> list[list[Steps]]:
        return in_batches(examples, lambda one: len(one.ids), self.recipe.train.batch_tokens)

    def loss(self, forward: Callable[..., Any], micro: list[Steps]) -> "Tensor":
        return self._losses(forward, micro, self.section.train_on_last_step_only)

    def _losses(self, forward: Callable[..., Any], micro: Sequence[Steps], last_only: bool) -> "Tensor":
        """The weighted sum of the labels' losses, which are counted."""
        import torch
        import torch.nn.functional as F

        logits: Tensor = forward([one.ids for one in micro], scores=True)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        classes = torch.tensor([label for one in micro for label in one.classes(last_only)], device=logits.device)
        weights = logits.new_tensor([one.weight for one in micro for _ in one.ids])
        losses = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="none")
        real = (classes != IGNORED) & (weights > 0)
        hits = logits.argmax(-1) == classes
        self.sums.add(
            steps=real.sum().item(),
            loss=losses.detach()[real].sum().item(),
            accuracy=hits[real].sum().item(),
            right=(classes[real] == 1).sum().item(),
        )
        return (losses * weights).sum()

    def rows(self, micro: list[Steps]) -> int:
        return sum(len(one.ids) for one in micro if one.weight)

    def finish(self) -> tuple[int, dict[str, float]]:
        got = self.sums.take(self.context)
        return int(self._tokens), {
            "accuracy": got["accuracy"] / got["steps"],
            "right_steps": got["right"] / got["steps"],
        }

    def evaluate(self) -> Metrics:
        """Loss and accuracy over all steps of held-out lines; none where a file has too few."""
        import torch

        from toolkit.patching.eval_mode import eval_mode

        context = self.context
        mine, total = self.held_out_examples()
        if not total:
            return {"eval_samples": 0}
        self.sums.add(**dict.fromkeys(SUMS, 0.0))  # a process may have none
        micros = self._batches(mine)
        with torch.no_grad(), eval_mode(context.model):
            for micro in counted(micros, len(micros), "held out: forwards"):
                for one in micro:
                    one.weight = 1.0
                self._losses(context.model, micro, last_only=False)
        got = self.sums.take(context)
        return {
            "eval_samples": total,
            "eval_loss": got["loss"] / got["steps"],
            "eval_accuracy": got["accuracy"] / got["steps"],
            "eval_right_steps": got["right"] / got["steps"],
        }

    def show(self, before: Metrics | None, after: Metrics) -> None:
        if after["eval_samples"]:
            start = f"{before['eval_accuracy']:.1%} before, " if before else ""
            print(
                f"held-out steps, the label more probable: {start}{after['eval_accuracy']:.1%} after "
                f"({after['eval_samples']} solutions, {after['eval_right_steps']:.1%} of their steps right)"
            )
