"""Self-distillation: the model learns, without a hint, what it would say with the hint in its prompt."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from toolkit.config.base import Count, Fraction
from toolkit.config.objective import OnPolicySection
from toolkit.errors import ToolkitError
from toolkit.training.formats import text_of_messages
from toolkit.training.objectives.base import RunContext
from toolkit.training.objectives.distillation import Target, WithTeacher

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.config.schema import Recipe
    from toolkit.engine.outputs import Completion
    from toolkit.state.batch import RaggedBatch
    from toolkit.training.distillation_losses import Comparison
    from toolkit.training.reference import Reference


class SDFTSection(OnPolicySection):
    """Self-distillation (Shenfeld et al., 2026); fields have the names of TRL's ``SDFTConfig``.

    ``data_files``, ``datasets``: lines with ``prompt`` and ``privileged_context`` (a text or messages, such as a hint
    or a demonstration); of a task it is the right answer. Reward functions are measured alone and may be left out.
    """

    needs_rewards: ClassVar[bool] = False
    needs_hint: ClassVar[bool] = True

    kind: Literal["sdft"] = "sdft"
    num_generations: Count = 8
    """Completions per prompt."""
    distillation_mode: Literal["topk_logits", "full_logits", "sampled_token"] = "topk_logits"
    """Over the student's most probable tokens, over all tokens, or of the sampled token alone."""
    distillation_alpha: Fraction = 0.5
    """0 is the KL divergence from teacher to student, 1 that from student to teacher, between them the Jensen-Shannon
    divergence in which the teacher has this weight. sampled_token takes 1 alone."""
    distillation_topk: Count = 100
    """Tokens of topk_logits."""
    distillation_add_tail: bool = False
    """Whether all other tokens are one outcome more; otherwise the top-k are normalised among themselves."""
    num_loss_tokens_to_skip: Annotated[int, Field(ge=0)] = 0
    """First tokens of a completion that are not learnt, where a teacher speaks of its hint."""
    teacher_model_kind: Literal["base", "live", "ema"] = "base"
    """Whose weights the teacher has: the initial model's (after the warm-up), the current ones, or the moving average
    of ``train.ema_decay`` (TRL's 1 - ``teacher_update_rate``)."""
    teacher_prompt_template: str = "{prompt}\n\n{privileged_context}"
    """The teacher's prompt; of messages, the text of the last one."""
    generate_from_teacher: bool = False
    """Completions are sampled behind the teacher's prompt instead of the student's."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.distillation_mode == "sampled_token" and self.distillation_alpha != 1.0:
            raise ValueError(
                "objective.distillation_alpha must be 1.0 with objective.distillation_mode 'sampled_token', got "
                f"{self.distillation_alpha}"
            )
        try:
            found = self.teacher_prompt_template.format(prompt="\0", privileged_context="\1")
        except (KeyError, IndexError, ValueError):
            found = ""
        if "\0" not in found or "\1" not in found:
            raise ValueError(
                "objective.teacher_prompt_template must have {prompt} and {privileged_context} and no other field, got "
                f"{self.teacher_prompt_template!r}"
            )
        return self

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        if self.teacher_model_kind == "ema" and recipe.train.ema_decay is None:
            raise ValueError("train.ema_decay must be given with objective.teacher_model_kind 'ema', got null")


class SDFT(WithTeacher[SDFTSection]):
    """Each completion's mean divergence from the teacher at its tokens, a mean over completions."""

    _reference: "Reference | None" = None

    def bind(self, context: RunContext) -> None:
        from toolkit.patching.adapters import vocabulary_size
        from toolkit.training.reference import Reference

        super().bind(context)
        section, vocabulary = self.section, vocabulary_size(context.model.model)
        if section.distillation_mode == "topk_logits" and section.distillation_topk > vocabulary:
            raise ToolkitError(
                f"objective.distillation_topk must be <= the vocabulary size, which is {vocabulary}, got "
                f"{section.distillation_topk}."
            )
        if section.teacher_model_kind == "base":
            self._reference = Reference(context.initial_model(), self.recipe.model, context.device)

    def comparison(self) -> "Comparison":
        from toolkit.training.distillation_losses import Comparison

        section = self.section
        return Comparison(
            section.distillation_mode, section.distillation_alpha, section.distillation_topk,
            section.distillation_add_tail, section.rollout.temperature,
        )  # fmt: skip

    def prompt_ids(self, problem: Any) -> list[int]:
        return self._teacher_prompt(problem) if self.section.generate_from_teacher else super().prompt_ids(problem)

    def _teacher_prompt(self, problem: Any) -> list[int]:
        """The tokens of the prompt with the hint."""
        prompt, template = self.prompts.prompt(problem), self.section.teacher_prompt_template
        hint = self.prompts.hint(problem)
        if isinstance(prompt, str):
            with_hint: Any = template.format(prompt=prompt, privileged_context=hint)
        else:
            *before, last = prompt
            if last.get("role") != "user":
                raise ToolkitError(
                    "a prompt must end with a message of role 'user' with objective.kind 'sdft', got "
                    f"{last.get('role')!r}."
                )
            content = template.format(prompt=text_of_messages([last]), privileged_context=hint)
            with_hint = [*before, {"role": "user", "content": content}]
        ids = self.prompts.encode(with_hint, problem)
        most = self.rollout.max_prompt_length
        if len(ids) > most:
            raise ToolkitError(
                f"a prompt with its privileged_context must have <= {most} tokens with train.max_length "
                f"{self.recipe.train.max_length} and objective.rollout.max_completion_length "
                f"{self.section.rollout.max_completion_length}, got {len(ids)}; raise train.max_length."
            )
        return ids

    def targets(self, problems: Sequence[Any], groups: "Sequence[Sequence[Completion]]") -> list[Target]:
        found = []
        for problem, group in zip(problems, groups):
            prompt, hinted = self.prompts.token_ids(problem), self._teacher_prompt(problem)
            found += [
                Target(
                    prompt, hinted, one.token_ids, skipped=self.section.num_loss_tokens_to_skip,
                    rotary_length=one.rotary_length or 1,
                )
                for one in group
            ]  # fmt: skip
        return found

    def weight(self, one: Target, tokens: float, completions: float) -> float:
        return self.context.world_size / completions / max(one.counted, 1)

    def teacher_logits(self, forward: Callable[..., Any], batch: "RaggedBatch", rows: "Tensor") -> "Tensor":
        from toolkit.patching.eval_mode import eval_mode

        if self._reference is not None:
            return self._reference.logits(batch, rows)
        # Before the student's forward: the moving average is written into the weights and taken out again.
        weights = self.context.averaged() if self.section.teacher_model_kind == "ema" else nullcontext()
        with weights, eval_mode(self.context.model):
            logits: Tensor = forward(batch, rows)
        return logits
