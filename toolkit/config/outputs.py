"""The sections ``checkpoint``, ``export``, ``log`` and ``evaluate`` of a recipe: what a run writes and measures."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from toolkit.config.base import Count, Fraction, Section

LoggerName = Literal["tensorboard", "wandb", "trackio"]


class CheckpointSection(Section):
    """When to save, beside the last step, and how many to keep."""

    save_steps: Count | None = 100
    save_total_limit: Count = 2


class ExportSection(Section):
    """A format of other programs, written after the last step to ``export`` in the run's folder; see docs/export.md."""

    to: str = "hf"
    """The target, such as hf, peft, gguf or compressed-tensors."""
    quantise: str | None = None
    """One of the target's formats of weights; null takes its first."""
    imatrix: str | None = None
    """For gguf: a file of llama-imatrix by which columns are weighed, or a text to make one from; null for none."""
    check: bool = True
    """Run the target's program, where it is installed, and compare its greedy tokens with the engine's."""


class LogSection(Section):
    """Beside metrics.jsonl, which is always written."""

    report_to: Annotated[
        list[LoggerName],
        BeforeValidator(lambda v: [] if v in ("none", False, None) else [v] if isinstance(v, str) else v),
    ] = Field(default=["tensorboard"])
    """One logger or several, or ``none``. wandb writes to ``wandb`` in the run's folder, for ``wandb sync``, and sends
    nothing unless the environment says ``WANDB_MODE=online``; trackio writes to its local database."""
    project: str = "toolkit"
    """What wandb and trackio call the project; the run has the recipe's ``run_name``."""
    plot: bool = True
    progress_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between progress lines where the output is not a terminal."""
    details_steps: Count | None = 10
    """Steps between lines of details.jsonl, which ``toolkit watch`` shows: sampled completions with their rewards, the
    engine's blocks and prefix tree in the rollout, and the tokens of each expert; null writes none."""
    num_completions: Count = 8
    """Completions in such a line."""


class EvaluateSection(Section):
    """The held-out measure, before the first step (where the objective has use for it), between, and after the last."""

    do_eval: bool = True
    eval_steps: Count | None = None
    """Measure every so many steps, too; the values join the step's metrics."""
    metric_for_best_model: str | None = None
    """A held-out metric, with or without ``eval_``, by which steps are compared; null is the objective's own."""
    greater_is_better: bool | None = None
    """Of that metric; null is false for losses and bits per byte."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint of the best measure between: it is what ``toolkit serve RUN`` opens and what is exported."""
    early_stopping_patience: Count | None = None
    """End after so many measures that are not better than the best one; null does not."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """By how much a measure must be better for ``early_stopping_patience``."""
    max_bytes: Count | None = None
    """pretrain: use at most this much held-out text (whole files, in hash order); null takes all of it."""
    overlap: Fraction = 0.25
    """pretrain: share of a window that repeats the document's previous tokens as context."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        wanted = self.load_best_model_at_end or self.early_stopping_patience is not None
        if wanted and (self.eval_steps is None or not self.do_eval):
            raise ValueError(
                "evaluate.eval_steps must be given, and evaluate.do_eval true, with evaluate.load_best_model_at_end or "
                "evaluate.early_stopping_patience"
            )
        return self
