"""What a training recipe may say. Types are strict, unknown keys are refused, ranges are checked here.

Units: lengths and budgets ending in ``tokens`` or ``length`` are tokens, ``bytes`` are bytes of UTF-8 text,
``every``, ``warmup`` and ``decay`` are optimizer steps.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from toolkit.config.base import Count, FolderName, Fraction, Section
from toolkit.config.objective import ObjectiveSection, PretrainObjective


class LoraSection(Section):
    """Low-rank adapters beside frozen weights (PEFT's LoRA); only they are trained and saved."""

    rank: Count = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The product of the adapter's matrices is scaled by alpha / rank."""
    targets: list[str] | None = None
    """Ends of module names, e.g. ``q_proj``; null is every linear layer but the head."""
    parameters: Annotated[list[str], Field(min_length=1)] | None = None
    """Ends of names of parameters, for the experts of a mixture, e.g. ``experts.gate_up_proj``; null is none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.targets == [] and self.parameters is None:
            raise ValueError("model.lora.targets is empty and model.lora.parameters null; one of them must name some")
        if self.parameters is not None and self.dropout > 0:
            raise ValueError(f"model.lora.dropout is {self.dropout}; with model.lora.parameters it must be 0")
        return self


class ModelSection(Section):
    """The model: random weights of an architecture (``config``), or a local checkpoint (``path``)."""

    path: str | None = None
    """Directory of a Hugging Face checkpoint with safetensors weights."""
    config: dict[str, Any] | None = None
    """``model_type`` and fields of its configuration; vocabulary and eos come from the tokenizer."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    roles: list[str] | None = None
    """Roles to patch; null patches every role that matches."""
    numerics: Literal["bitwise", "fast"] | None = None
    """Tier of numerics; null is the device's default."""
    lora: LoraSection | None = None
    """Train adapters instead of the weights; null trains the weights."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(f"exactly one of model.path and model.config must be given, not {given}")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            kind = self.config.get("model_type")
            raise ValueError(f"model.config.model_type is {kind!r}; it must be a transformers model type, e.g. 'llama'")
        return self


class TokenizerSection(Section):
    """A tokenizer to load (``path``), or byte-level BPE trained on the training split."""

    path: str | None = None
    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] = 4096
    """Size with the end-of-text token; 256 bytes and that token are the least."""
    max_bytes: Count | None = None
    """Train on at most this much text (whole files, in hash order); null takes all of it."""


class DataSection(Section):
    """What objective.kind 'pretrain' reads: text files, one document a file.

    They are split into training and held-out by a hash of the file's name.
    """

    root: str = "stdlib"
    """A directory, or "stdlib": the source of the running Python's standard library."""
    include: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*.py"])
    """File name patterns."""
    exclude: list[str] = Field(
        default_factory=lambda: ["site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"]
    )
    """Names of folders that are not entered."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Expected share of the files that is held out."""
    interleave: Count = 32
    """Documents open at once; a batch takes pieces from them in turn."""


class OptimizerSection(Section):
    """AdamW. Matrices decay, vectors (norms, biases) do not."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.95]
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null does not clip."""


class ScheduleSection(Section):
    """Linear warm-up, then cosine, constant, or constant with a linear decay at the end (wsd)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    decay: Annotated[int, Field(ge=0)] = 0
    """Steps of the linear decay; wsd only."""
    floor: Fraction = 0.1
    """Where the decay ends, as a share of optimizer.lr."""


class TrainSection(Section):
    """The size of a step and their number. A step trains ``batch_tokens * accumulate * processes`` tokens."""

    steps: Count = 1000
    batch_tokens: Annotated[int, Field(ge=2)] = 2048
    """Predicted tokens in one forward: one flat ragged row, always full."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Longest sequence; longer documents are cut."""
    accumulate: Count = 1
    """Forwards a step whose gradients are averaged."""


class CheckpointSection(Section):
    """When to save, beside the last step, and how many to keep."""

    every: Count | None = 100
    keep: Count = 2


class LogSection(Section):
    """Beside metrics.jsonl, which is always written."""

    tensorboard: bool = True
    plot: bool = True
    every: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between progress lines where the output is not a terminal."""


class EvaluateSection(Section):
    """Held-out bits per byte after the last step."""

    enabled: bool = True
    max_bytes: Count | None = None
    """Use at most this much held-out text (whole files, in hash order); null takes all of it."""
    overlap: Fraction = 0.25
    """Share of a window that repeats the document's previous tokens as context."""


class Recipe(Section):
    """A training run, complete: with the same machine and versions it determines the weights bit for bit."""

    name: FolderName = "run"
    """Folder of the run inside ``output``."""
    output: Annotated[str, Field(min_length=1)] = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    resume: Annotated[str, Field(pattern=r"^(never|auto|step-\d+)$")] = "never"
    """never: start anew; auto: go on from the latest checkpoint if there is one; step-N: from that one."""
    overwrite: bool = False
    """Start anew although the run's folder holds checkpoints; they are deleted."""
    objective: ObjectiveSection = Field(default_factory=PretrainObjective)
    model: ModelSection
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    data: DataSection = Field(default_factory=DataSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection = Field(default_factory=TrainSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        schedule, steps = self.schedule, self.train.steps
        if schedule.decay and schedule.kind != "wsd":
            raise ValueError(f"schedule.decay is {schedule.decay}; it must be 0 unless schedule.kind is 'wsd'")
        if schedule.warmup + schedule.decay > steps:
            raise ValueError(
                f"schedule.warmup + schedule.decay is {schedule.warmup + schedule.decay}; "
                f"it must be at most train.steps, which is {steps}"
            )
        kind = self.objective.kind
        if self.model.lora is not None and self.model.path is None and getattr(self.objective, "warmup", None) is None:
            raise ValueError(
                "model.lora is given while model.path and objective.warmup are null; adapters need a trained model"
            )
        if kind not in ("pretrain", "sft") and self.train.accumulate != 1:
            raise ValueError(
                f"train.accumulate is {self.train.accumulate}; it must be 1 with objective.kind '{kind}', which makes "
                "forwards of train.batch_tokens as they are needed"
            )
        if not isinstance(self.objective, PretrainObjective) and self.objective.task is not None:
            longest, most = self.objective.rollout.max_tokens, self.train.max_length
            if longest >= most:
                raise ValueError(
                    f"objective.rollout.max_tokens is {longest}; it must be below train.max_length, which is {most}"
                )
        if self.overwrite and self.resume != "never":
            raise ValueError(f"overwrite is true while resume is '{self.resume}'; one run cannot do both")
        return self
