"""The sections ``optimizer`` and ``schedule`` of a recipe."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from toolkit.config.base import Fraction, Section


class OptimizerSection(Section):
    """AdamW by default. Matrices decay, vectors (norms, biases) do not."""

    optim: Literal["adamw_torch_fused", "adamw_8bit", "adafactor", "muon", "sgd"] = "adamw_torch_fused"
    """adamw_8bit keeps the moments of parameters of 4,096 elements or more in 8 bits: 2 bytes an element, not 8.
    adafactor: second moments by row and column. muon: momentum made orthogonal for matrices inside of layers, at a rate
    that gives updates of AdamW's size; embeddings, head and vectors by AdamW. All but AdamW need float32 weights."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are clipped to this norm; null does not clip."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 5
    """A step whose loss or gradient norm is not finite is skipped: weights, optimizer and schedule stay as they are.
    More than so many in a row end the run; 0 ends it at the first."""
    kahan_sum: bool | None = None
    """For weights that are 16-bit themselves (``model.dtype: bfloat16``): keep what rounding cuts off an update and add
    it to the next one. null is true for them, unless they are rounded stochastically."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Of muon (Nesterov's) and sgd."""
    bf16_stochastic_round: bool = False
    """For such weights, instead: round up or down with a probability of the distance."""

    @property
    def kept_of_rounding(self) -> Literal["kahan_sum", "bf16_stochastic_round", "none"]:
        """What becomes of the part of an update that 16-bit weights have no room for."""
        if self.bf16_stochastic_round:
            return "bf16_stochastic_round"
        return "none" if self.kahan_sum is False else "kahan_sum"

    @model_validator(mode="after")
    def _one_way_to_round(self) -> Self:
        if self.kahan_sum and self.bf16_stochastic_round:
            raise ValueError(
                "at most one of optimizer.kahan_sum and optimizer.bf16_stochastic_round must be true, got both"
            )
        return self


class ScheduleSection(Section):
    """Linear warm-up, then cosine, constant, or constant with a linear decay at the end; or one of transformers'."""

    lr_scheduler_type: Literal[
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "constant_with_warmup",
        "linear",
        "cosine",
        "constant",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_restarts",
    ] = "cosine_with_min_lr"
    """From linear on they are transformers', step for step: their warm-up begins at 0, so that the first step of one
    with a warm-up changes nothing."""
    lr_scheduler_kwargs: dict[str, float] = Field(default_factory=dict)
    """Further settings of transformers' schedules, such as num_cycles (cosine_with_restarts) or power (polynomial)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_ratio: Fraction = 0.0
    """The same as a share of train.max_steps, rounded up."""
    num_decay_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the linear decay; warmup_stable_decay only."""
    min_lr_ratio: Fraction = 0.1
    """Where the decay ends, as a share of optimizer.learning_rate: cosine_with_min_lr and warmup_stable_decay."""

    @property
    def of_transformers(self) -> bool:
        """Whether the schedule is one of transformers'."""
        return self.lr_scheduler_type not in ("cosine_with_min_lr", "warmup_stable_decay", "constant_with_warmup")

    def num_warmup_steps(self, steps: int) -> int:
        """Steps of the warm-up in a run of ``steps``."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * steps)

    def check_steps(self, steps: int) -> None:
        """Raise ValueError where a run of ``steps`` has no room for the warm-up and the decay."""
        needed = self.num_warmup_steps(steps) + self.num_decay_steps
        if needed > steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.num_decay_steps must be <= train.max_steps, which is {steps}, got "
                f"{needed}"
            )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("at most one of schedule.warmup_steps and schedule.warmup_ratio must be given, got both")
        if (self.warmup_steps or self.warmup_ratio) and self.lr_scheduler_type == "constant":
            raise ValueError(
                "schedule.lr_scheduler_type must be 'constant_with_warmup' for a constant rate after a warm-up, got "
                "'constant'"
            )
        if self.lr_scheduler_kwargs and not self.of_transformers:
            raise ValueError(
                f"schedule.lr_scheduler_kwargs must be empty with schedule.lr_scheduler_type '{self.lr_scheduler_type}'"
            )
        return self
