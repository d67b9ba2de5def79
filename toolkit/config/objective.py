"""The recipe's section ``objective``: what its kinds share.

The section of a kind is beside its loss, in ``toolkit/training/objectives/<kind>.py``, and registers itself. Those
files are imported when a recipe is validated; they load neither torch nor transformers.
"""

import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from toolkit.config.base import Count, Section
from toolkit.registry import Registry

if TYPE_CHECKING:
    from toolkit.config.schema import Recipe

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class ObjectiveSection(Section):
    """The fields of one kind of objective. A subclass gives ``kind`` a literal type, which registers it."""

    supports_gradient_accumulation: ClassVar[bool] = False
    """Whether a step has ``train.gradient_accumulation_steps`` forwards, not as many as it needs."""
    supports_expert_parallel: ClassVar[bool] = True

    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        literals = typing.get_args(cls.model_fields["kind"].annotation)
        if literals:
            OBJECTIVES.add(literals[0], cls)

    def check(self, recipe: "Recipe") -> None:
        """Raise ValueError where other sections of the recipe do not fit."""


class SyncedReferenceSection(ObjectiveSection):
    """A reference that may follow the model in training (TR-DPO; Gorbatovski et al., 2024); fields as in TRL."""

    sync_ref_model: bool = False
    """Move the reference towards the model: ``reference = a model + (1 - a) reference``, a ``ref_model_mixup_alpha``.
    Checkpoints then hold the reference, too."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    ref_model_sync_steps: Count = 512
    """After every so many steps."""

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        for name, given in (("model.lora", recipe.model.lora), ("model.quantise", recipe.model.quantise)):
            if self.sync_ref_model and given is not None:
                raise ValueError(f"objective.sync_ref_model must be false with {name}, got true")


OBJECTIVES: Registry[ObjectiveSection] = Registry("toolkit.training.objectives")


def parse_objective(value: Any) -> ObjectiveSection:
    """The section of the kind that ``value`` names. Raises ValueError or pydantic's ValidationError."""
    if isinstance(value, ObjectiveSection):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"objective must be a mapping of fields, got {value!r}")
    if "kind" not in value:
        raise ValueError(f"objective.kind is required: one of {', '.join(OBJECTIVES.names())}")
    return OBJECTIVES.find("objective.kind", value["kind"]).model_validate(value)


class WarmupSection(Section):
    """SFT on right answers that comes first, in the folder ``warmup`` of the run.

    Its optimizer has the settings of ``optimizer`` but for the rate, which falls as a cosine to a tenth.
    """

    max_steps: Count
    learning_rate: Positive = 1e-3
    batch_tokens: Annotated[int, Field(ge=2)] = 2048
    """Tokens in one forward."""
    task: dict[str, Any] | None = None
    """Another task than the objective's own; null for the same."""


class EvaluationSection(Section):
    """Held-out problems, and how they are answered: greedily, and sampled at temperature 1."""

    max_eval_samples: Count = 256
    val_set_size: Share = 0.1
    """Expected share of all problems (or lines of ``data_files``) that is never trained on."""


class SpeculationSection(Section):
    """Speculative decoding of rollouts, which changes no token; see ``toolkit.engine.speculation.config``."""

    method: Literal["ngram", "suffix"] = "suffix"
    num_speculative_tokens: Count = 7
    prompt_lookup_min: Count = 2
    adaptive: bool = True


class RolloutSection(Section):
    """The engine that generates inside training. It lives as long as the run."""

    max_completion_length: Count = 32
    """Longest completion in tokens; the end-of-text token counts."""
    temperature: Positive = 1.0
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    """Texts that end a completion, which does not show them; their tokens are trained on."""
    max_num_seqs: Count = 64
    """Most sequences in flight."""
    memory_tokens: Count | None = None
    """Tokens of state that the engine holds; null for ``max_num_seqs`` of ``train.max_length``."""
    structured_outputs: dict[str, Any] | None = None
    """The form of completions, such as ``{regex: "[0-9]+"}``: the fields of ``StructuredOutputsParams``. Objectives
    train the model's own probabilities, not those among the tokens that the form allows."""
    speculative_config: SpeculationSection | None = None
    """How tokens are drafted; null to draft none."""
    engine: dict[str, Any] | None = None
    """An engine elsewhere: ``name`` (``infer_patches.ray:RayEngine``) and its arguments; null is this process's."""


class PromptSection(ObjectiveSection):
    """What the objectives on prompts share."""

    task: dict[str, Any] | None = None
    """A verifiable task: ``name``, and the task's own fields."""
    warmup: WarmupSection | None = None
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)

    @model_validator(mode="after")
    def _warmup_has_a_task(self) -> Self:
        if self.warmup is not None and self.warmup.task is None and self.task is None:
            raise ValueError("objective.warmup.task must be given without objective.task, got null")
        return self

    def check(self, recipe: "Recipe") -> None:
        longest, most = self.rollout.max_completion_length, recipe.train.max_length
        if self.task is not None and longest >= most:
            raise ValueError(
                f"objective.rollout.max_completion_length must be < train.max_length, which is {most}, got {longest}"
            )


class DatasetSection(Section):
    """A dataset: what ``datasets.load_dataset`` opens, or a json lines file."""

    path: Annotated[str, Field(min_length=1)]
    """A file (.jsonl, .json, .parquet, .arrow, .csv, .tsv, .txt), a folder of such files or of ``save_to_disk``, or a
    repository of the Hub."""
    name: str | None = None
    """The configuration of a repository that has several."""
    revision: str | None = None
    """Branch, tag or commit of a repository of the Hub."""
    data_files: str | list[str] | None = None
    """Patterns of files within a folder or repository; null takes all."""
    split: Annotated[str, Field(min_length=1)] = "train"
    """A split, or a slice of one, e.g. ``train[:10%]``."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column is which field, e.g. ``{prompt: question, completion: answer}``; others keep their names."""
    max_samples: Count | None = None
    """Train on at most this many lines, chosen by a hash of their number; null is all."""
    weight: Positive = 1.0
    """How often an epoch has each line, on average."""
    streaming: bool = False
    """Read lines as they are trained on, without an index of them; for one dataset alone, without weights."""
    shuffle_buffer_size: Count = 1000
    """Lines of a stream that are shuffled together."""


class LinesSection(PromptSection):
    """What the objectives share that take a task's problems, lines of a file, or datasets."""

    supports_streaming: ClassVar[bool] = True

    data_files: str | None = None
    """A json lines file, plain or gzip, in one of TRL's dataset formats; see the kind for its fields."""
    datasets: Annotated[list[DatasetSection], Field(min_length=1)] | None = None
    """One dataset or several, shuffled together."""
    eval_datasets: Annotated[list[DatasetSection], Field(min_length=1)] | None = None
    """Held-out lines; null holds out ``evaluation.val_set_size`` of those to train on."""
    chat_template: str | None = None
    """For messages: Jinja text, a file with it, or the name of one of the tokenizer's templates; null takes the
    tokenizer's own. It is saved with the tokenizer."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, e.g. ``{enable_thinking: false}``; a line's own come on top."""
    on_bad_lines: Literal["error", "skip"] = "error"
    """Lines that cannot be trained on (no JSON, missing fields, messages that the template does not take): error ends
    the run before its first step and names them, skip passes over them and counts them."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("task", "data_files", "datasets") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "exactly one of objective.task, objective.data_files and objective.datasets must be given, got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.eval_datasets is not None and self.datasets is None:
            raise ValueError("objective.eval_datasets must be null without objective.datasets")
        self._check_streams()
        return self

    def _check_streams(self) -> None:
        for at, one in enumerate(self.datasets or ()):
            if one.streaming and (len(self.datasets or ()) > 1 or one.weight != 1.0):
                raise ValueError(
                    f"objective.datasets[{at}].streaming must be false for one of several datasets or with a weight"
                )
            if one.streaming and not self.supports_streaming:
                raise ValueError(f"objective.datasets[{at}].streaming must be false with objective.kind '{self.kind}'")
        for at, one in enumerate(self.eval_datasets or ()):
            if one.streaming:
                raise ValueError(f"objective.eval_datasets[{at}].streaming must be false")


class OfflineSection(LinesSection):
    """Examples of a task, of a file, or of datasets."""

    splits_examples: ClassVar[bool] = False
    """Whether an example that is too long may become several."""

    excess_length_strategy: Literal["truncate", "drop", "raise", "split"] = "truncate"
    """Examples longer than ``train.max_length``: cut at the end, left out, an error before the first step, or (sft)
    split into examples that follow each other. One of which nothing that counts is left is always left out, and
    counted."""
    dataset_prepared_path: str | None = None
    """A folder for tokenised lines: each is tokenised once, and a later start with the same tokenizer, template and
    settings reads it. null keeps none: a line is tokenised when it is checked and whenever it is trained on."""
    max_check_samples: Count | None = None
    """Lines that are tokenised before the first step, to count and check them; null is all of them. Later lines are
    checked as they come."""

    @model_validator(mode="after")
    def _may_split(self) -> Self:
        if self.excess_length_strategy == "split" and not self.splits_examples:
            raise ValueError(
                f"objective.excess_length_strategy must be truncate, drop or raise with objective.kind '{self.kind}', "
                "got 'split'"
            )
        return self


class OnPolicySection(LinesSection):
    """Rolls out from the live weights, on a task's problems or on the prompts of lines.

    ``data_files``, ``datasets``: lines with ``prompt``, a text or messages; reward functions get their other columns.
    """

    supports_expert_parallel: ClassVar[bool] = False
    supports_streaming: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = True
    """Whether completions of lines must be judged to be trained on."""
    needs_hint: ClassVar[bool] = False
    """Whether lines must have ``privileged_context`` beside their prompt."""
    environment_fields: ClassVar[Sequence[str]] = ("environment", "environment_factory", "tools")
    """Of an environment, which may judge in the place of functions; a kind has all of them or none."""

    @property
    def needs_completions(self) -> bool:
        """Whether lines must have a completion beside their prompt."""
        return False

    prompts: Count = 16
    """Prompts per step, over all processes."""
    reward_funcs: list[Annotated[str, Field(pattern=r"^([\w.]+:\w+|.*/.*)$")]] = Field(default_factory=list)
    """For lines: reward models, by a path with a slash (one score a sequence; ``kind: reward`` trains them), and
    functions by ``module:function``, plain or asynchronous, with TRL's signature. They are called by name with
    ``prompts``, ``completions``, ``completion_ids`` and the lines' columns, an entry for each completion, beside
    ``trainer_state``, ``log_metric`` and ``log_extra``, and return a number for each, or None where they do not apply.
    A completion for which one raises or returns NaN is dropped, and counted."""
    reward_weights: list[float] | None = None
    """Of each function; null is 1 each."""
    reward_timeout: Positive | None = None
    """Seconds that a reward function may take for the completions of a step; those of one that takes longer are
    dropped, and counted. null is no bound."""
    filter_overlong_prompts: bool = False
    """Pass over problems whose prompt leaves no room for ``rollout.max_completion_length`` within ``train.max_length``,
    and count them (``prompts_dropped``); false is an error."""

    @model_validator(mode="after")
    def _rewarded(self) -> Self:
        if any(getattr(self, name, None) for name in self.environment_fields):
            self._check_weights()
            return self
        if (self.task is None) != bool(self.reward_funcs) and (self.needs_rewards or self.reward_funcs):
            raise ValueError(
                "objective.reward_funcs must be given for objective.data_files and objective.datasets, and for them "
                f"alone, got {self.reward_funcs}"
            )
        self._check_weights()
        return self

    def _check_weights(self) -> None:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"objective.reward_weights must have a weight for each of {len(self.reward_funcs)} reward_funcs, got "
                f"{len(self.reward_weights)}"
            )
