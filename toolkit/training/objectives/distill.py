"""On-policy distillation: the student rolls out, and learns the teacher's distribution at every sampled token.

Agarwal et al., "On-Policy Distillation of Language Models", 2024 (generalised knowledge distillation).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from toolkit.config.base import Count, Fraction, Section
from toolkit.config.objective import OnPolicySection, Positive
from toolkit.errors import ToolkitError
from toolkit.packing import in_batches
from toolkit.training.objectives.base import RunContext
from toolkit.training.objectives.on_policy import OnPolicyObjective

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.state.batch import RaggedBatch


class TeacherSection(Section):
    """A checkpoint, or a model that an SFT run trains first, in the folder ``teacher`` of the run."""

    name_or_path: str | None = None
    """As ``model.name_or_path``."""
    config: dict[str, Any] | None = None
    """As ``model.config``; the tokenizer is the student's."""
    max_steps: Count = 1000
    """Of the SFT run; it and the next two as in ``warmup``."""
    learning_rate: Positive = 1e-3
    batch_tokens: Annotated[int, Field(ge=2)] = 2048

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name_or_path is None) == (self.config is None):
            given = "both" if self.name_or_path is not None else "neither"
            raise ValueError(
                f"exactly one of objective.teacher.name_or_path and objective.teacher.config must be given, got {given}"
            )
        return self


class DistillSection(OnPolicySection):
    """On-policy distillation, generalised (GKD). Of lines, reward functions are measured alone and may be left out."""

    needs_rewards: ClassVar[bool] = False

    kind: Literal["distill"] = "distill"
    teacher: TeacherSection
    num_generations: Count = 1
    """Completions per prompt."""
    beta: Fraction = 1.0
    """As in TRL's ``GKDConfig``: 0 is the KL divergence from teacher to student, 1 (mode-seeking) that from student to
    teacher, between them the Jensen-Shannon divergence in which the teacher has this weight."""
    teacher_top_k: Count = 16
    """Of the teacher's most probable tokens; all others are one outcome."""


class Sampled(NamedTuple):
    """A completion after its prompt without its last token, how many of its tokens count, and its rotary length."""

    ids: list[int]
    counted: int
    rotary_length: int


class MicroBatch(NamedTuple):
    """Rows whose next token the student sampled, for how many completions, and the teacher's top-k tokens there."""

    batch: "RaggedBatch"
    rows: "Tensor"
    counts: "Tensor"
    candidates: "Tensor"
    teacher: "Tensor"
    share: float


class Distillation(OnPolicyObjective[DistillSection]):
    """See ``DistillSection``. The teacher is frozen; its log-probabilities are computed once per rollout."""

    primary_metric = "divergence"

    def bind(self, context: RunContext) -> None:
        from toolkit.patching.adapters import vocabulary_size
        from toolkit.training.model import Reference, load_checkpoint

        super().bind(context)
        model = load_checkpoint(self._teacher(), self.recipe.forward_dtype, "objective.teacher.name_or_path")
        models: tuple[Any, Any] = (model, context.model.model)
        vocabulary, own = (vocabulary_size(m) for m in models)
        if vocabulary != own:
            raise ToolkitError(
                f"objective.teacher must have the student's vocabulary size, which is {own}, got {vocabulary}."
            )
        if self.section.teacher_top_k >= vocabulary:
            raise ToolkitError(
                f"objective.teacher_top_k must be < the vocabulary size, which is {vocabulary}, got "
                f"{self.section.teacher_top_k}."
            )
        self.teacher = Reference(model, self.recipe.model, context.device)

    def _teacher(self) -> str | Path:
        """The checkpoint of the teacher, which is trained first if there is none yet."""
        from toolkit.training.nested import teacher_recipe

        if self.section.teacher.name_or_path is not None:
            return self.section.teacher.name_or_path
        tokenizer = self.context.folder / "tokenizer"
        if self.context.accelerator.is_main_process:
            self.context.tokenizer.save_pretrained(str(tokenizer))
        self.context.accelerator.wait_for_everyone()
        self.context.log(f"teacher: {self.section.teacher.max_steps} steps")
        return self.context.nested_run(teacher_recipe(self.recipe, tokenizer))

    def updates(self, step: int) -> Iterator[Sequence[MicroBatch]]:
        self.begin()
        problems, groups = self.roll_out(step, self.section.num_generations)
        self.count(problems, groups)
        completions = [one for group in groups for one in group]
        # The last token predicts nothing.
        sampled = [
            Sampled([*one.prompt_token_ids, *one.token_ids[:-1]], len(one.token_ids), one.rotary_length or 1)
            for one in completions
        ]
        packs = in_batches(sampled, lambda item: len(item.ids), self.recipe.train.batch_tokens)
        (total,) = self.context.reduce_sum([sum(len(one.token_ids) for one in completions)])
        self.trained_tokens = int(total)
        count = self.context.reduce_max(len(packs))
        micros = [self._micro(pack, self.context.world_size / total) for pack in packs]
        micros += [micros[0]._replace(share=0.0) for _ in range(count - len(micros))]
        yield micros

    def _micro(self, pack: Sequence[Sampled], share: float) -> MicroBatch:
        import torch

        from toolkit.patching import choose_rotary_lengths
        from toolkit.state.batch import RaggedBatch

        device = self.context.device
        models = [self.context.model.model, self.teacher.model]
        rotary = choose_rotary_lengths(models, [max(len(one.ids) + 1, one.rotary_length) for one in pack])
        batch = RaggedBatch.from_sequences([one.ids for one in pack], device=device, rotary_lengths=rotary)
        ends = accumulate(len(one.ids) for one in pack)
        positions = torch.cat([torch.arange(end - one.counted, end) for end, one in zip(ends, pack)]).to(device)
        # Completions share the rows of their common prefix; the loss there counts for each of them.
        rows, counts = (positions if batch.sample_rows is None else batch.sample_rows[positions]).unique(
            return_counts=True
        )
        logprobs = self.teacher.logits(batch, rows).float().log_softmax(-1)
        best = logprobs.topk(self.section.teacher_top_k, dim=-1)
        return MicroBatch(batch, rows, counts, best.indices, best.values, share)

    def loss(self, forward: Callable[..., Any], micro: MicroBatch) -> "Tensor":
        from toolkit.ops.linear_logprob.deferred import token_logprobs
        from toolkit.training.losses import generalized_jsd, with_tail

        logits = forward(micro.batch, micro.rows)
        student, _ = token_logprobs(logits, micro.candidates)
        each = generalized_jsd(with_tail(micro.teacher.to(student.dtype)), with_tail(student), self.section.beta)
        divergence = (each * micro.counts).sum()
        real = float(micro.share > 0.0)
        self.sums.add(divergence=divergence.item() * real, trained=micro.counts.sum().item() * real)
        return divergence * micro.share

    def rows(self, micro: MicroBatch) -> int:
        if not micro.share:
            return 0
        return len(micro.batch.tokens if micro.batch.sample_rows is None else micro.batch.sample_rows)

    def finish(self) -> tuple[int, dict[str, float]]:
        got = self.take()
        return self.trained_tokens, {"divergence": got["divergence"] / got["trained"], **self.metrics(got)}
