"""What objectives with a teacher share: its distribution at every token of a completion is what the student learns."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from toolkit.config.objective import OnPolicySection
from toolkit.packing import in_batches
from toolkit.training.objectives.base import Metrics, RunContext
from toolkit.training.objectives.on_policy import OnPolicyObjective
from toolkit.training.progress import counted

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.engine.outputs import Completion
    from toolkit.state.batch import RaggedBatch
    from toolkit.training.distillation_losses import Comparison


class Target(NamedTuple):
    """A completion to learn.

    Args:
        prompt: the student's.
        teacher_prompt: the teacher's.
        completion: tokens.
        weight: of each of them in the loss; 0 for one that counts for nothing.
        skipped: first tokens that do not count.
        rotary_length: by which rotary tables are made, at least.
    """

    prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]
    weight: float = 0.0
    skipped: int = 0
    rotary_length: int = 1

    @property
    def counted(self) -> int:
        """Tokens that count."""
        return max(len(self.completion) - self.skipped, 0)

    @property
    def student_ids(self) -> list[int]:
        """What the student reads: the last token predicts nothing."""
        return [*self.prompt, *self.completion[:-1]]

    @property
    def teacher_ids(self) -> list[int]:
        """What the teacher reads."""
        return [*self.teacher_prompt, *self.completion[:-1]]


class MicroBatch(NamedTuple):
    """Distributions to compare, R of them: common rows of completions are there once.

    Args:
        batch, rows: of the student, [U].
        teacher_batch, teacher_rows: of the teacher, [W].
        student_at, teacher_at: [R] which of those rows; None for all, in order.
        tokens: [R] that follow.
        counts: [R] completions that have them.
        weights: [R] in the loss.
        real: whether it is more than padding.
    """

    batch: "RaggedBatch"
    rows: "Tensor"
    teacher_batch: "RaggedBatch"
    teacher_rows: "Tensor"
    student_at: "Tensor | None"
    teacher_at: "Tensor | None"
    tokens: "Tensor"
    counts: "Tensor"
    weights: "Tensor"
    real: bool = True


D = TypeVar("D", bound=OnPolicySection)


class WithTeacher(OnPolicyObjective[D]):
    """Completions, and the divergence of the student's distribution from a teacher's at every token of them."""

    primary_metric = "divergence"

    @property
    def eval_metric(self) -> str:  # type: ignore[override]
        judged = self.prompts.solvable or self.prompts.functions is not None
        return super().eval_metric if judged else "eval_divergence"

    @abstractmethod
    def comparison(self) -> "Comparison":
        """How distributions are compared."""

    @abstractmethod
    def targets(self, problems: Sequence[Any], groups: "Sequence[Sequence[Completion]]") -> list[Target]:
        """Completions to learn, without weights."""

    @abstractmethod
    def weight(self, one: Target, tokens: float, completions: float) -> float:
        """Of each token of a target that counts; all processes have so many of them, and so many targets, in a step."""

    @abstractmethod
    def teacher_logits(self, forward: Callable[..., Any], batch: "RaggedBatch", rows: "Tensor") -> "Tensor":
        """[len(rows), V] of the teacher, without gradients; ``forward`` is the student's."""

    @property
    def teacher_model(self) -> Any:
        """Whose rotary tables are made beside the student's."""
        return self.context.model.model

    def bind(self, context: RunContext) -> None:
        super().bind(context)
        self._how = self.comparison()

    def weigh(self, targets: Sequence[Target]) -> list[Target]:
        """This process's targets of a step with their weights; counts the trained tokens."""
        tokens, completions = self.context.reduce_sum([sum(one.counted for one in targets), len(targets)])
        self.trained_tokens = int(tokens)
        return [one._replace(weight=self.weight(one, tokens, completions)) for one in targets]

    def micro_batches(self, targets: Sequence[Target]) -> list[MicroBatch]:
        """Forwards of ``train.batch_tokens``, as many in every process."""
        packs = in_batches(targets, self._cost, self.recipe.train.batch_tokens)
        count = self.context.reduce_max(len(packs))
        micros = [self._micro(pack) for pack in packs]
        padding = micros[0]._replace(weights=micros[0].weights * 0.0, real=False)
        return micros + [padding] * (count - len(micros))

    @staticmethod
    def _cost(one: Target) -> int:
        return max(len(one.student_ids), len(one.teacher_ids))

    def _micro(self, pack: Sequence[Target]) -> MicroBatch:
        import torch

        device, student = self.context.device, [one.student_ids for one in pack]
        lengths = [max(len(one.student_ids) + 1, one.rotary_length) for one in pack]
        batch, rows, student_at = self._rows(student, pack, lengths)
        hinted = any(one.prompt != one.teacher_prompt for one in pack)
        teacher_batch, teacher_rows, teacher_at = batch, rows, student_at
        if hinted:
            lengths = [max(len(one.teacher_ids) + 1, one.rotary_length) for one in pack]
            teacher_batch, teacher_rows, teacher_at = self._rows([one.teacher_ids for one in pack], pack, lengths)
        tokens = torch.tensor([token for one in pack for token in one.completion[_first(one) :]], device=device)
        weights = [one.weight if one.counted else 0.0 for one in pack for _ in one.completion[_first(one) :]]
        counted = [int(one.counted > 0) for one in pack for _ in one.completion[_first(one) :]]
        # Completions that have rows of both in common are one distribution to compare, with the sum of their weights.
        key = student_at * len(teacher_rows) + teacher_at
        if self._how.mode == "sampled_token":
            key = torch.stack([key, tokens], 1)
            _, inverse = key.unique(dim=0, return_inverse=True)
        else:
            _, inverse = key.unique(return_inverse=True)
        size = int(inverse.max()) + 1
        first = torch.full((size,), len(inverse), device=device).scatter_reduce(
            0, inverse, torch.arange(len(inverse), device=device), "amin"
        )
        counts = torch.zeros(size, dtype=torch.int64, device=device)
        counts = counts.index_add(0, inverse, torch.tensor(counted, device=device))
        summed = torch.zeros(size, dtype=torch.float64, device=device)
        summed = summed.index_add(0, inverse, torch.tensor(weights, dtype=torch.float64, device=device))
        return MicroBatch(
            batch,
            rows,
            teacher_batch,
            teacher_rows,
            _unless_in_order(student_at[first], rows),
            _unless_in_order(teacher_at[first], teacher_rows),
            tokens[first],
            counts,
            summed,
        )

    def _rows(
        self, sequences: list[list[int]], pack: Sequence[Target], lengths: list[int]
    ) -> "tuple[RaggedBatch, Tensor, Tensor]":
        """A batch, its distinct rows before tokens that count, and which of them each token has."""
        import torch

        from toolkit.patching import choose_rotary_lengths
        from toolkit.state.batch import RaggedBatch

        device = self.context.device
        rotary = choose_rotary_lengths([self.context.model.model, self.teacher_model], lengths)
        batch = RaggedBatch.from_sequences(sequences, device=device, rotary_lengths=rotary)
        ends = accumulate(map(len, sequences))
        positions = torch.cat(
            [torch.arange(end - len(one.completion) + _first(one), end) for end, one in zip(ends, pack)]
        ).to(device)
        found = positions if batch.sample_rows is None else batch.sample_rows[positions]
        rows, at = found.unique(return_inverse=True)
        return batch, rows, at

    def loss(self, forward: Callable[..., Any], micro: MicroBatch) -> "Tensor":
        each = self._divergences(forward, micro)
        real = float(micro.real)
        self.sums.add(
            divergence=(each.detach() * micro.counts).sum().item() * real, trained=micro.counts.sum().item() * real
        )
        return (each * micro.weights.to(each.dtype)).sum()

    def _divergences(self, forward: Callable[..., Any], micro: MicroBatch) -> "Tensor":
        import torch

        from toolkit.training.distillation_losses import distillation_loss

        with torch.no_grad():
            teacher = self.teacher_logits(forward, micro.teacher_batch, micro.teacher_rows)
        student = forward(micro.batch, micro.rows)
        if micro.student_at is not None:
            student = student[micro.student_at]
        if micro.teacher_at is not None:
            teacher = teacher[micro.teacher_at]
        return distillation_loss(student, teacher, self._how, micro.tokens)

    def rows(self, micro: MicroBatch) -> int:
        if not micro.real:
            return 0
        return len(micro.batch.tokens if micro.batch.sample_rows is None else micro.batch.sample_rows)

    def updates(self, step: int) -> Iterator[Sequence[MicroBatch]]:
        self.begin()
        yield self.micro_batches(self.weigh(self.step_targets(step)))

    def step_targets(self, step: int) -> list[Target]:
        """This process's completions of a step."""
        problems, groups = self.roll_out(step, getattr(self.section, "num_generations", 1))
        self.count(problems, groups)
        return self.targets(problems, groups)

    def finish(self) -> tuple[int, dict[str, float]]:
        got = self.take()
        return self.trained_tokens, {"divergence": got["divergence"] / max(got["trained"], 1.0), **self.metrics(got)}

    def evaluate(self) -> Metrics:
        """As of the other objectives with rollouts; ``eval_divergence`` is of the completions sampled there."""
        import torch

        from toolkit.patching.eval_mode import eval_mode

        targets: list[Target] = []
        found = self.evaluate_completions(lambda problems, groups: targets.extend(self.targets(problems, groups)))
        if not found["eval_samples"]:
            return found
        model, total, count = self.context.model, 0.0, 0.0
        with torch.no_grad(), eval_mode(model):
            packs = in_batches(targets, self._cost, self.recipe.train.batch_tokens)
            for pack in counted(packs, len(packs), "held out: forwards"):
                micro = self._micro(pack)
                total += (self._divergences(model, micro) * micro.counts).sum().item()
                count += micro.counts.sum().item()
        total, count = self.context.reduce_sum([total, count])
        return found | {"eval_divergence": total / max(count, 1.0)}

    def show(self, before: Metrics | None, after: Metrics) -> None:
        super().show(before, after)
        if "eval_divergence" in after:
            start = f"{before['eval_divergence']:.4f} before, " if before and "eval_divergence" in before else ""
            print(f"held-out completions, divergence per token: {start}{after['eval_divergence']:.4f} nats after")


def _unless_in_order(index: "Tensor", whole: "Tensor") -> "Tensor | None":
    """An index of rows; None where it is all of them, in order."""
    in_order = len(index) == len(whole) and index.tolist() == list(range(len(whole)))
    return None if in_order else index


def _first(one: Target) -> int:
    """The first of a completion's tokens that is looked at: the last one at least, so that no micro-batch is empty."""
    return min(one.skipped, len(one.completion) - 1)
