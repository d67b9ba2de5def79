"""Distillation from another model: the student learns the teacher's distribution at every token of completions.

Agarwal et al., "On-Policy Distillation of Language Models", 2024 (generalised knowledge distillation).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from toolkit.config.base import Count, Fraction, Section
from toolkit.config.objective import OnPolicySection, Positive
from toolkit.errors import ToolkitError
from toolkit.training.corpus import digest
from toolkit.training.objectives.base import RunContext
from toolkit.training.objectives.distillation import Target, WithTeacher

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.chat import ChatTokenizer
    from toolkit.engine.outputs import Completion
    from toolkit.state.batch import RaggedBatch
    from toolkit.training.distillation_losses import Comparison
    from toolkit.training.rollout import Rollout


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
    """Distillation, on-policy or generalised (GKD); fields have the names of TRL's ``GKDConfig``.

    Of lines, reward functions are measured alone and may be left out. With ``lmbda`` below 1 lines have ``prompt`` and
    ``completion``, or ``messages`` of which the last one is the assistant's; of a task the right answer is learnt.
    """

    needs_rewards: ClassVar[bool] = False

    kind: Literal["distill"] = "distill"
    teacher: TeacherSection
    num_generations: Count = 1
    """Completions per prompt."""
    beta: Fraction = 1.0
    """0 is the KL divergence from teacher to student, 1 (mode-seeking) that from student to teacher, between them the
    Jensen-Shannon divergence in which the teacher has this weight."""
    lmbda: Fraction = 1.0
    """Share of the steps whose completions the student samples; those of the others are the data's. TRL's default is
    0.5."""
    seq_kd: bool = False
    """In those others the teacher samples the completions."""
    teacher_top_k: Count | None = 16
    """Of the teacher's most probable tokens; all others are one outcome. null compares all tokens, as TRL does."""

    @property
    def needs_completions(self) -> bool:
        return self.lmbda < 1.0 and not self.seq_kd

    @model_validator(mode="after")
    def _the_teacher_samples(self) -> Self:
        if self.seq_kd and self.lmbda == 1.0:
            raise ValueError("objective.lmbda must be < 1 with objective.seq_kd, got 1.0")
        return self


class Distillation(WithTeacher[DistillSection]):
    """See ``DistillSection``. The teacher is frozen."""

    _sampled = True
    _chat: "ChatTokenizer"
    _teacher_rollout: "Rollout | None" = None

    def bind(self, context: RunContext) -> None:
        from toolkit.chat import ChatTokenizer
        from toolkit.patching.adapters import vocabulary_size
        from toolkit.training.model import eos_token_ids, load_checkpoint
        from toolkit.training.reference import Reference

        super().bind(context)
        model = load_checkpoint(self._teacher(), self.recipe.forward_dtype, "objective.teacher.name_or_path")
        models: tuple[Any, Any] = (model, context.model.model)
        vocabulary, own = (vocabulary_size(m) for m in models)
        if vocabulary != own:
            raise ToolkitError(
                f"objective.teacher must have the student's vocabulary size, which is {own}, got {vocabulary}."
            )
        if self.section.teacher_top_k is not None and self.section.teacher_top_k >= vocabulary:
            raise ToolkitError(
                f"objective.teacher_top_k must be < the vocabulary size, which is {vocabulary}, got "
                f"{self.section.teacher_top_k}."
            )
        self.teacher = Reference(model, self.recipe.model, context.device)
        self._chat = ChatTokenizer(
            context.tokenizer,
            chat_template_kwargs=self.section.chat_template_kwargs,
            eos_token_ids=eos_token_ids(context.model.model),
        )
        if self.section.lmbda < 1.0 and self.section.seq_kd:
            self._teacher_rollout = self._rollout_of_teacher(context)

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

    def _rollout_of_teacher(self, context: RunContext) -> "Rollout":
        """What generates with the teacher's weights, of which every process has all."""
        from toolkit.training.model import RaggedModel
        from toolkit.training.rollout import Rollout

        of_teacher = replace(context, model=RaggedModel(self.teacher.model), gathered=nullcontext)
        return Rollout(of_teacher, self.section.rollout.model_copy(update={"engine": None}))

    @property
    def teacher_model(self) -> Any:
        return self.teacher.model

    def comparison(self) -> "Comparison":
        from toolkit.training.distillation_losses import Comparison

        top_k = self.section.teacher_top_k
        return Comparison("full_logits" if top_k is None else "teacher_topk_logits", self.section.beta, top_k or 0)

    def teacher_logits(self, forward: Callable[..., Any], batch: "RaggedBatch", rows: "Tensor") -> "Tensor":
        return self.teacher.logits(batch, rows)

    def on_policy(self, step: int) -> bool:
        """Whether the student samples the completions of a step; the same in all processes."""
        return digest(f"{self.recipe.seed}/lmbda/{step}") < self.section.lmbda * 2**64

    def step_targets(self, step: int) -> list[Target]:
        self._sampled = self.on_policy(step)
        if self._sampled:
            return super().step_targets(step)
        self.prompts.begin_step(step, self.recipe.train.max_steps)
        problems, prompts = self._next_problems()
        if self._teacher_rollout is not None:
            groups = self._teacher_rollout.generate(prompts, self.seeds(step, len(problems)), 1)
            return self.targets(problems, groups)
        return [self._given(problem) for problem in problems]

    def _given(self, problem: Any) -> Target:
        """The data's own completion."""
        given, completion = self.prompts.with_completion(problem)
        tokens = self._chat.preference(given, completion, completion, *self.prompts.options(problem))
        room = max(self.recipe.train.max_length - len(tokens.prompt), 1)
        return Target(tokens.prompt, tokens.prompt, tokens.chosen[:room])

    def targets(self, problems: Sequence[Any], groups: "Sequence[Sequence[Completion]]") -> list[Target]:
        return [
            Target(one.prompt_token_ids, one.prompt_token_ids, one.token_ids, rotary_length=one.rotary_length or 1)
            for group in groups
            for one in group
        ]

    def weight(self, one: Target, tokens: float, completions: float) -> float:
        return self.context.world_size / tokens

    def finish(self) -> tuple[int, dict[str, float]]:
        share = {"on_policy": float(self._sampled)} if self.section.lmbda < 1.0 else {}
        if self._sampled:
            tokens, values = super().finish()
            return tokens, {**values, **share}
        got = self.take()
        return self.trained_tokens, {"divergence": got["divergence"] / max(got["trained"], 1.0), **share}

    def close(self) -> None:
        if self._teacher_rollout is not None:
            self._teacher_rollout.close()
        super().close()
