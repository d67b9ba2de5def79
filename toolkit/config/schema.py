"""The sections of a recipe. Types are strict, unknown keys are refused, ranges are checked here.

Keys have the names of transformers' ``TrainingArguments``, TRL and PEFT where those have one. Units: fields ending in
``tokens`` or ``length`` are tokens, ``bytes`` are bytes of UTF-8 text, ``steps`` are optimizer steps.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from toolkit.config.base import Count, FolderName, Section
from toolkit.config.distributed import DistributedSection, ExpertParallelSection, check_distributed
from toolkit.config.objective import OBJECTIVES, ObjectiveSection, parse_objective
from toolkit.config.optimization import OptimizerSection, ScheduleSection
from toolkit.config.outputs import CheckpointSection, EvaluateSection, ExportSection, LogSection


def _known_start(value: bool | str) -> bool | str:
    if isinstance(value, str) and not re.fullmatch(r"gaussian|orthogonal|olora|pissa(_niter_[1-9][0-9]*)?", value):
        raise ValueError(
            "model.lora.init_lora_weights must be true, false, gaussian, orthogonal, olora, pissa or pissa_niter_N, "
            f"got {value!r}"
        )
    return value


class LoraSection(Section):
    """Low-rank adapters beside frozen weights: fields of PEFT's ``LoraConfig``. Only adapters are trained and saved."""

    r: Count = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """The product of the adapter's matrices is scaled by lora_alpha / r."""
    target_modules: list[str] | None = None
    """Ends of module names, e.g. ``q_proj``; null is every linear layer but the head, those of towers included."""
    exclude_modules: list[str] | str | None = None
    """Ends of module names that get no adapters, or a regular expression of whole names, e.g. ``.*visual.*``."""
    target_parameters: Annotated[list[str], Field(min_length=1)] | None = None
    """Ends of names of parameters, for experts, e.g. ``experts.gate_up_proj``; null is none."""
    trainable_token_indices: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Tokens whose rows of the embedding are trained too (new special tokens, say); null is none."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Direction by the adapter, magnitude by a vector (Liu et al., 2024)."""
    init_lora_weights: Annotated[bool | str, AfterValidator(_known_start)] = True
    """How adapters begin, by PEFT's names: true, gaussian, orthogonal, pissa, pissa_niter_N or olora leave the model as
    it is, false does not. ``pissa`` (``pissa_niter_N`` by N fast iterations) and ``olora`` begin with factors of each
    weight, which are taken off it; checkpoints hold adapters of twice the rank for the weights as they were."""
    modules_to_save: Annotated[list[str], Field(min_length=1)] | None = None
    """Ends of names of modules that are trained and saved whole beside the adapters, e.g. ``embed_tokens``; null is
    none. A reward model's head always is."""
    adapter: str | None = None
    """LoRA adapters to continue: a folder of PEFT's, a run, or a repository of the Hub. Rank, layers and kind are
    theirs, so the other fields are left out; the reference of preferences has them, too. null begins new ones."""

    @property
    def decomposes(self) -> bool:
        """Whether adapters begin with factors of the weights."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))

    @model_validator(mode="after")
    def _kinds_fit(self) -> Self:
        if self.adapter is not None:
            for name, field in type(self).model_fields.items():
                if name != "adapter" and getattr(self, name) != field.default:
                    raise ValueError(
                        f"model.lora.{name} must be left out with model.lora.adapter, whose adapters have theirs, got "
                        f"{getattr(self, name)!r}"
                    )
        if self.decomposes and self.target_parameters is not None:
            raise ValueError(
                f"model.lora.target_parameters must be null with init_lora_weights {self.init_lora_weights!r}, got "
                f"{self.target_parameters!r}"
            )
        return self

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.target_modules == [] and self.target_parameters is None:
            raise ValueError(
                "one of model.lora.target_modules and model.lora.target_parameters must name something, got [] and null"
            )
        if self.target_parameters is not None and self.lora_dropout > 0:
            raise ValueError(
                f"model.lora.lora_dropout must be 0 with model.lora.target_parameters, got {self.lora_dropout}"
            )
        return self


class QuantiseSection(Section):
    """Weights of linear layers and experts in a low-precision format, as ``toolkit.quantise`` has them."""

    format: Literal["fp8", "int4", "int8", "nf4", "q8_0"]
    include: Annotated[list[str], Field(min_length=1)] = Field(["*"])
    """Patterns of names of parameters, or of modules around them."""
    exclude: list[str] | None = None
    """Patterns of what stays dense of them; null is the head and routers."""
    options: dict[str, Any] = Field({})
    """Of the format's quantiser: ``group`` and ``symmetric`` of int4, ``double`` of nf4."""


class ModelSection(Section):
    """The model: random weights of an architecture (``config``), or a checkpoint (``name_or_path``)."""

    name_or_path: str | None = None
    """A folder of a model, adapters or a run, a GGUF file, or a repository of the Hub such as ``org/name``."""
    revision: str | None = None
    """Branch, tag or commit of a repository of the Hub; null is its main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    config: dict[str, Any] | None = None
    """``model_type`` and fields of its configuration; vocabulary and eos come from the tokenizer."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the weights that the optimizer updates; see ``train.mixed_precision`` for that of the forward."""
    roles: list[str] | None = None
    """Roles to patch; null, and ``default`` among them, patches every role that matches but encoder_attention."""
    numerics: Literal["bitwise", "fast"] | None = None
    """Numerics mode; null is the device's default."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """``int8`` rounds keys and values to eight bits, in rollouts' blocks and in training."""
    lora: LoraSection | None = None
    """Train adapters instead of the weights; null trains the weights."""
    quantise: Annotated[
        QuantiseSection | None, BeforeValidator(lambda v: {"format": v} if isinstance(v, str) else v)
    ] = None
    """A format, such as ``nf4``, or the fields of ``toolkit.quantise``: with ``lora`` adapters are trained on a frozen
    base of few bits (QLoRA), without it the weights through their rounding (quantisation-aware training). Rollouts read
    the same codes. null keeps the weights as they are."""
    freeze_parameters: Annotated[list[str], Field(min_length=1)] | None = None
    """Patterns of parameters' names that are not trained, e.g. ``model.visual`` (all that begins so) or ``*.norm.*``;
    null trains all."""
    trainable_parameters: Annotated[list[str], Field(min_length=1)] | None = None
    """Patterns of names that are trained although ``freeze_parameters`` matches them, e.g. ``model.visual.merger``."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.lora is not None and self.lora.decomposes and self.quantise is not None:
            raise ValueError(
                f"model.quantise must be null with model.lora.init_lora_weights {self.lora.init_lora_weights!r}, which "
                f"changes the weights, got {self.quantise.format!r}"
            )
        if self.freeze_parameters is None and self.trainable_parameters is not None:
            raise ValueError(
                "model.trainable_parameters must be null without model.freeze_parameters, from which they are excepted"
            )
        if self.freeze_parameters is not None and self.lora is not None:
            raise ValueError(
                "model.freeze_parameters must be null with model.lora, beside which all weights are frozen; "
                "model.lora.exclude_modules names layers without adapters"
            )
        if (self.name_or_path is None) == (self.config is None):
            given = "both" if self.name_or_path is not None else "neither"
            raise ValueError(f"exactly one of model.name_or_path and model.config must be given, got {given}")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            kind = self.config.get("model_type")
            raise ValueError(
                f"model.config.model_type must be a model type of transformers, e.g. 'llama', got {kind!r}"
            )
        return self


class TokenizerSection(Section):
    """A tokenizer to load (``name_or_path``), or byte-level BPE trained on the training split."""

    name_or_path: str | None = None
    """A folder with a tokenizer, or a repository of the Hub; null takes the one of ``model.name_or_path``."""
    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] = 4096
    """Size with the end-of-text token; 256 bytes and that token are the least."""
    max_bytes: Count | None = None
    """Train on at most this much text (whole files, in hash order); null takes all of it."""
    added_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Special tokens to add. A model with fewer rows grows: their embeddings begin as samples of the distribution that
    the others have (transformers' ``resize_token_embeddings``). Beside adapters ``model.lora.modules_to_save`` must
    have the embeddings and the head."""


class DataSection(Section):
    """What objective.kind 'pretrain' reads: text files, one document per file.

    They are split into training and held-out by a hash of the file's name.
    """

    data_dir: str = "stdlib"
    """A directory, or "stdlib": the source of the running Python's standard library."""
    include: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*.py"])
    """File name patterns."""
    exclude: list[str] = Field(
        default_factory=lambda: ["site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"]
    )
    """Names of folders that are not entered."""
    val_set_size: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Expected share of the files that is held out."""
    interleave: Count = 32
    """Documents open at once; a batch takes chunks from them in turn."""
    streams: Count | None = None
    """Streams that the files are sharded to; a step takes a batch of each. The number of processes must divide it; null
    is one per process."""


class MoeSection(Section):
    """How the routers of MoE models are balanced, by every objective, warm-up included.

    Dense models have nothing to balance, and a teacher that the run trains is not balanced.
    """

    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the load balancing loss (Switch Transformers), the mean of each layer's own."""
    router_z_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the routers' mean squared log-sum-exp (ST-MoE)."""
    bias_update_rate: Annotated[float, Field(ge=0)] = 0.0
    """By how much a router's expert bias moves after every update, where it has one (DeepSeek-V3)."""
    recompute: bool = False
    """Compute the experts' activations again in the backward instead of keeping them."""


def _no_of_yaml(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads no as false


class TrainSection(Section):
    """The size of a step and their number.

    A step trains ``batch_tokens * gradient_accumulation_steps`` tokens in each process, with ``data.streams`` for each
    stream.
    """

    max_steps: Count = 1000
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the lines of ``objective.data_files`` or ``datasets``; ``max_steps`` is then what they come to."""
    batch_tokens: Annotated[int, Field(ge=2)] = 2048
    """Predicted tokens in one forward: one flat ragged row, always full."""
    per_device_train_batch_size: Count | None = None
    """sft: so many examples in one forward, of any length, instead of ``batch_tokens``."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Longest sequence; longer documents are split."""
    gradient_accumulation_steps: Count = 1
    """Forwards per step, whose gradients are averaged."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_no_of_yaml)] = "no"
    """bf16, fp16: model, rollout, evaluation and saved weights have 16 bits; the optimizer updates float32 copies,
    which checkpoints hold for resuming. fp16 scales the loss. no: all is in ``model.dtype``."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward instead of keeping them; no bit of a gradient changes."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights, of this decay: it is what is measured on held-out data, and
    ``ema`` in the run's folder has it as a model after the last step. null keeps none."""
    moe: MoeSection = Field(default_factory=MoeSection)
    indexer_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """For models with sparse attention: weight of the loss by which their indexers learn to select keys, KL(attention
    over the selected keys || softmax of the indexer's scores), summed over layers (DeepSeek-V3.2). 0 freezes
    them: no other loss reaches them. Every objective adds it, warm-up included; a teacher that the run trains does
    not."""
    expert_parallel: ExpertParallelSection | None = None
    """For MoE models; null keeps all experts in every process."""
    distributed: Annotated[
        DistributedSection, BeforeValidator(lambda v: {"strategy": v} if isinstance(v, str) else v)
    ] = Field(default_factory=DistributedSection)
    """How several processes share the model: ddp, fsdp2, zero1, zero2, zero3 or tp; or a mapping with options."""


def _checkpoint_to_resume(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(r"step-\d+", value)):
        return value
    raise ValueError(f"resume_from_checkpoint must be true, false or 'step-' and a number, got {value!r}")


class Recipe(Section):
    """A training run, complete: with the same machine and versions it determines the weights bit for bit."""

    run_name: FolderName = "run"
    """Folder of the run inside ``output_dir``."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    resume_from_checkpoint: Annotated[bool | str, BeforeValidator(_checkpoint_to_resume)] = False
    """false: a new start; true: resume from the latest checkpoint if there is one; step-N: from that one."""
    overwrite: bool = False
    """Start again although the run's folder holds checkpoints; they are deleted."""
    objective: Annotated[SerializeAsAny[ObjectiveSection], BeforeValidator(parse_objective)] = Field(
        default_factory=lambda: parse_objective({"kind": "pretrain"})
    )
    model: ModelSection
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    data: DataSection = Field(default_factory=DataSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection = Field(default_factory=TrainSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    export: list[ExportSection] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        schedule, steps, objective = self.schedule, self.train.max_steps, self.objective
        if schedule.num_decay_steps and schedule.lr_scheduler_type != "warmup_stable_decay":
            raise ValueError(
                "schedule.num_decay_steps must be 0 unless schedule.lr_scheduler_type is 'warmup_stable_decay', got "
                f"{schedule.num_decay_steps}"
            )
        if self.train.num_train_epochs is None:
            schedule.check_steps(steps)
        elif not any(getattr(objective, name, None) for name in ("data_files", "datasets")):
            raise ValueError(
                "train.num_train_epochs must be null without objective.data_files and objective.datasets, got "
                f"{self.train.num_train_epochs:g}"
            )
        elif any(one.streaming for one in getattr(objective, "datasets", None) or ()):
            raise ValueError(
                "train.num_train_epochs must be null with a dataset that is streamed, whose length is not known, got "
                f"{self.train.num_train_epochs:g}"
            )
        if self.model.lora and self.model.name_or_path is None and getattr(objective, "warmup", None) is None:
            raise ValueError(
                "model.lora must be null while model.name_or_path and objective.warmup are null: adapters need a "
                "trained model"
            )
        if self.train.expert_parallel is not None and (self.model.lora or not objective.supports_expert_parallel):
            other = "model.lora" if self.model.lora is not None else f"objective.kind '{objective.kind}'"
            kinds = [name for name in OBJECTIVES.names() if OBJECTIVES.find("", name).supports_expert_parallel]
            raise ValueError(
                f"train.expert_parallel must be null with {other}: it is for objective.kind "
                f"{', '.join(map(repr, kinds))} without adapters"
            )
        if not objective.supports_gradient_accumulation and self.train.gradient_accumulation_steps != 1:
            raise ValueError(
                f"train.gradient_accumulation_steps must be 1 with objective.kind '{objective.kind}', which makes "
                f"forwards of train.batch_tokens as they are needed, got {self.train.gradient_accumulation_steps}"
            )
        if self.train.per_device_train_batch_size is not None and objective.kind != "sft":
            raise ValueError(
                f"train.per_device_train_batch_size must be null with objective.kind '{objective.kind}', got "
                f"{self.train.per_device_train_batch_size}"
            )
        if self.evaluate.load_best_model_at_end and (self.trains_quantised or self.train.expert_parallel is not None):
            other = "model.quantise" if self.trains_quantised else "train.expert_parallel"
            raise ValueError(f"evaluate.load_best_model_at_end must be false with {other}")
        if self.train.ema_decay is not None and (self.trains_quantised or self.train.expert_parallel is not None):
            other = "model.quantise" if self.trains_quantised else "train.expert_parallel"
            raise ValueError(f"train.ema_decay must be null with {other}, got {self.train.ema_decay}")
        if self.train.ema_decay is not None and self.evaluate.load_best_model_at_end:
            raise ValueError("evaluate.load_best_model_at_end must be false with train.ema_decay, got true")
        self._check_precision()
        check_distributed(self)
        objective.check(self)
        if self.overwrite and self.resume_from_checkpoint is not False:
            raise ValueError(
                f"overwrite must be false with resume_from_checkpoint {self.resume_from_checkpoint!r}, got true"
            )
        return self

    @property
    def forward_dtype(self) -> str:
        """The dtype that the model's forward reads its weights in, in training, rollout and evaluation."""
        return {"no": self.model.dtype, "bf16": "bfloat16", "fp16": "float16"}[self.train.mixed_precision]

    @property
    def trains_quantised(self) -> bool:
        """Whether weights are trained through their rounding to a format."""
        return self.model.quantise is not None and self.model.lora is None

    def _check_precision(self) -> None:
        dtype, mixed, optimizer = self.model.dtype, self.train.mixed_precision, self.optimizer
        if mixed != "no" and dtype != "float32":
            raise ValueError(
                f"model.dtype must be 'float32' with train.mixed_precision '{mixed}', as it is the dtype of the "
                f"weights that the optimizer updates, got '{dtype}'"
            )
        if self.trains_quantised and dtype != "float32":
            raise ValueError(
                "model.dtype must be 'float32' with model.quantise and without model.lora, as it is the dtype of the "
                f"weights that the optimizer updates and rounds, got '{dtype}'"
            )
        if dtype == "float16":
            raise ValueError(
                "model.dtype must be 'float32', with train.mixed_precision 'fp16', to train in float16, whose "
                "gradients need loss scaling, got 'float16'"
            )
        rounded = (dtype, mixed) != ("float32", "no") or self.trains_quantised
        if rounded and optimizer.optim in ("adafactor", "muon", "sgd"):
            raise ValueError(
                f"optimizer.optim must be one of AdamW's with weights of fewer bits than 32, got '{optimizer.optim}'"
            )
        for name in ("kahan_sum", "bf16_stochastic_round"):
            if getattr(optimizer, name) and dtype != "bfloat16":
                raise ValueError(
                    f"optimizer.{name} must be false unless model.dtype is 'bfloat16': it is for weights that have no "
                    "float32 copy, got true"
                )
