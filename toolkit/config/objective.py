"""The recipe's section ``objective``: what a run minimises, a section a kind."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from toolkit.config.base import Count, Section

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class WarmupSection(Section):
    """A supervised run on right answers that comes first, in the folder ``warmup`` of the run.

    Its optimizer has the settings of ``optimizer`` but for the rate, which falls as a cosine from ``lr`` to a tenth.
    """

    steps: Count
    lr: Positive = 1e-3
    batch_tokens: Annotated[int, Field(ge=2)] = 2048
    """Tokens in one forward."""
    task: dict[str, Any] | None = None
    """Another task than the objective's own; null for the same."""


class TeacherSection(Section):
    """A checkpoint, or a model that a supervised run trains first, in the folder ``teacher`` of the run."""

    path: str | None = None
    """Folder of a checkpoint or run."""
    config: dict[str, Any] | None = None
    """As ``model.config``; the tokenizer is the student's."""
    steps: Count = 1000
    """Of the supervised run; it and the next two as in ``warmup``."""
    lr: Positive = 1e-3
    batch_tokens: Annotated[int, Field(ge=2)] = 2048

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(
                f"exactly one of objective.teacher.path and objective.teacher.config must be given, not {given}"
            )
        return self


class EvaluationSection(Section):
    """Held-out problems, and how they are answered: greedily, and sampled at temperature 1."""

    problems: Count = 256
    held_out: Share = 0.1
    """Expected share of all problems (or lines of ``data``) that is never trained on."""


class RolloutSection(Section):
    """The engine that generates inside training. It lives as long as the run."""

    max_tokens: Count = 32
    """Longest completion; the end-of-text token counts."""
    temperature: Positive = 1.0
    sequences: Count = 64
    """Most sequences in flight."""
    memory_tokens: Count | None = None
    """Tokens of state that the engine holds; null for ``sequences`` of ``train.max_length``."""


class PretrainObjective(Section):
    """Next-token cross-entropy over the documents of section ``data``."""

    kind: Literal["pretrain"] = "pretrain"


class _OnTask(Section):
    """What the objectives on prompts share."""

    task: dict[str, Any] | None = None
    """A verifiable task: ``name``, and the task's own fields."""
    warmup: WarmupSection | None = None
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)

    @model_validator(mode="after")
    def _warmup_has_a_task(self) -> Self:
        if self.warmup is not None and self.warmup.task is None and self.task is None:
            raise ValueError("objective.warmup.task is null; without objective.task it must be given")
        return self


class _OnData(_OnTask):
    """Examples of a task, or of a file."""

    data: str | None = None
    """A json lines file; see the kind for its fields."""
    chat_template: str | None = None
    """Jinja text for ``messages``; null takes the tokenizer's own."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (self.data is None):
            given = "both" if self.task is not None else "neither"
            raise ValueError(f"exactly one of objective.task and objective.data must be given, not {given}")
        return self


class SftObjective(_OnData):
    """Cross-entropy of completions only, packed. ``data``: lines with ``messages``, or ``prompt`` and ``completion``.

    In a conversation every message of the assistant counts, and its end; nothing else does.
    """

    kind: Literal["sft"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    z_loss: Annotated[float, Field(ge=0)] = 0.0


class DpoObjective(_OnData):
    """Direct preference optimisation. ``data``: lines with ``prompt``, ``chosen`` and ``rejected``.

    The reference is the model as training found it (after the warm-up).
    """

    kind: Literal["dpo"]
    pairs: Count = 32
    """Pairs a step, over all processes."""
    beta: Positive = 0.1
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answer's cross-entropy beside the preference (RPO)."""


class _OnPolicy(_OnTask):
    """Rolls out from the live weights."""

    prompts: Count = 16
    """Prompts a step, over all processes."""

    @model_validator(mode="after")
    def _has_a_task(self) -> Self:
        if self.task is None:
            raise ValueError("objective.task is null; a rollout needs a task")
        return self


class GrpoObjective(_OnPolicy):
    """Group-relative policy optimisation and its relatives.

    GRPO (DeepSeekMath, 2024) as it stands. Dr. GRPO (Liu et al., 2025): ``scale: none, average: constant``.
    DAPO (Yu et al., 2025): ``clip_high: 0.28, dynamic_sampling: true, average: token``.
    GSPO (Zheng et al., 2025): ``ratio: sequence, clip_low: 3e-4, clip_high: 4e-4``.
    """

    kind: Literal["grpo"]
    group: Annotated[int, Field(ge=2)] = 8
    """Completions a prompt."""
    updates: Count = 1
    """Optimizer updates on each batch of rollouts."""
    scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by the standard deviation of their group."""
    average: Literal["sequence", "token", "constant"] = "sequence"
    """Of tokens: a mean a completion first; over all alike; or a sum over ``rollout.max_tokens`` a completion."""
    ratio: Literal["token", "sequence"] = "token"
    """Each token's own, or the geometric mean of its completion's."""
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all alike, and roll out others in their place."""
    max_rounds: Count = 4
    """Rounds of rollouts a step at the most with ``dynamic_sampling``; what is there then is used."""
    importance_cap: Positive | None = None
    """Weigh tokens by min(p_train / p_rollout, cap), without gradient; for the fast tier. null does not."""
    replay_routing: bool = False
    """Of a mixture of experts: train every token through the experts that it was rolled out with."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the divergence from the model as training found it (after the warm-up); above 0 keeps a copy of that."""

    @model_validator(mode="after")
    def _draws_from_the_model_itself(self) -> Self:
        if self.rollout.temperature != 1.0:
            raise ValueError(
                f"objective.rollout.temperature is {self.rollout.temperature}; it must be 1.0 with objective.kind "
                "'grpo', which trains the distribution that it draws from"
            )
        return self


class DistillObjective(_OnPolicy):
    """On-policy distillation: the student rolls out, a teacher says what it would have said."""

    kind: Literal["distill"]
    teacher: TeacherSection
    completions: Count = 1
    """Completions a prompt."""
    divergence: Literal["reverse", "forward", "jensen_shannon"] = "reverse"
    weight: Share = 0.5
    """The teacher's part in the mixture of ``jensen_shannon``."""
    top_k: Count = 16
    """Of the teacher's likeliest tokens; all others are one outcome."""


ObjectiveSection = Annotated[
    PretrainObjective | SftObjective | DpoObjective | GrpoObjective | DistillObjective, Field(discriminator="kind")
]
