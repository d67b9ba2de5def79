"""How sequences are pooled: a model's defaults, and what a request asks for. The names are vLLM's."""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from toolkit.engine.checks import check_bool, check_cut, check_int, check_names
from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.sentences import shown

POOLING_TYPES = ("LAST", "MEAN", "CLS", "ALL")
ACTIVATIONS = ("identity", "sigmoid", "softmax")
DENSE_ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "sigmoid")
TASKS = ("embed", "token_embed", "classify", "token_classify")


@dataclass(frozen=True)
class Projection:
    """A dense layer behind the pooling (the module ``Dense`` of sentence-transformers).

    Args:
        weight: [out, in].
        bias: [out], or None.
        activation: one of ``DENSE_ACTIVATIONS``.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str = "identity"

    def __post_init__(self) -> None:
        if self.activation not in DENSE_ACTIVATIONS:
            raise ToolkitError(must_be_one_of("activation", self.activation, DENSE_ACTIVATIONS))


@dataclass(frozen=True, kw_only=True)
class PoolerConfig:
    """The defaults of a model; what is None is chosen by the model.

    Args:
        pooling_type: LAST, MEAN or CLS of a sequence's hidden states, or ALL of them, in any case. None is LAST for
            models whose tokens see those before them, CLS for encoders.
        normalize: divide embeddings by their length; None is True.
        use_activation: apply the activation to logits; None is True.
        activation: of logits: identity, sigmoid or softmax. None is what the configuration says: none for
            ``problem_type`` "regression", sigmoid for several labels at once or for one label, else softmax.
        projections: dense layers behind the pooling, in order, or mappings of their fields.

    Raises:
        ToolkitError: for a bad value.
    """

    pooling_type: str | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    activation: str | None = None
    projections: tuple[Projection, ...] = ()

    def __post_init__(self) -> None:
        if self.pooling_type is not None:
            kind = str(self.pooling_type).upper()
            if kind not in POOLING_TYPES:
                raise ToolkitError(must_be_one_of("pooling_type", self.pooling_type, POOLING_TYPES))
            object.__setattr__(self, "pooling_type", kind)
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ToolkitError(must_be_one_of("activation", self.activation, ACTIVATIONS))
        given = tuple(Projection(**one) if isinstance(one, dict) else one for one in self.projections)
        object.__setattr__(self, "projections", given)
        for name in ("normalize", "use_activation"):
            if getattr(self, name) is not None:
                check_bool(name, getattr(self, name))

    @classmethod
    def of(cls, given: Any, defaults: "PoolerConfig | None" = None) -> "PoolerConfig":
        """``defaults`` with what ``given`` says: a ``PoolerConfig``, a mapping of its fields, or None for nothing."""
        base = cls() if defaults is None else defaults
        if given is None:
            return base
        names = tuple(field.name for field in fields(cls))
        if isinstance(given, dict):
            check_names("PoolerConfig", given, names)
            given = cls(**given)
        if not isinstance(given, cls):
            raise ToolkitError(f"pooler_config must be a PoolerConfig or a mapping of its fields, got {shown(given)}.")
        said = {name: getattr(given, name) for name in names if getattr(given, name) not in (None, ())}
        return replace(base, **said)


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """What a request asks for.

    Args:
        dimensions: of embeddings: the first of them, normalised after the cut (Matryoshka); None for all.
        normalize: of embeddings; None for the model's default.
        use_activation: of logits: False returns them as they are (rewards); None for the model's default. Of
            embeddings it is another name of ``normalize``.
        truncate_prompt_tokens: cut longer prompts to this many tokens, -1 to the model's length; None refuses them.
        task: embed, token_embed, classify or token_classify; None for the model's own.

    Raises:
        ToolkitError: for a bad value.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    task: str | None = None

    def with_task(self, task: str) -> "PoolingParams":
        """The same for a task."""
        return replace(self, task=task)

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            check_int("dimensions", self.dimensions, 1, also=" or None")
        for name in ("normalize", "use_activation"):
            if getattr(self, name) is not None:
                check_bool(name, getattr(self, name))
        if self.truncate_prompt_tokens is not None:
            check_cut("truncate_prompt_tokens", self.truncate_prompt_tokens)
        if self.task is not None and not (isinstance(self.task, str) and self.task in TASKS):
            asked = self.task if isinstance(self.task, str) else shown(self.task)
            raise ToolkitError(must_be_one_of("task", asked, TASKS))
        if None not in (self.normalize, self.use_activation) and self.normalize != self.use_activation:
            raise ToolkitError(
                f"normalize must be equal to use_activation where both are given, got {self.normalize} and "
                f"{self.use_activation}."
            )


def pooling_params_of(given: Any, count: int, task: str | None = None) -> list[PoolingParams]:
    """The parameters of ``count`` prompts: of one object, one for each, or None.

    Args:
        given: what the caller gave.
        count: prompts.
        task: that all of them get; None for what each asks for.

    Raises:
        ToolkitError: another number of them, other objects, or one that asks for another task.
    """
    params = [given or PoolingParams()] * count if given is None or isinstance(given, PoolingParams) else given
    if not isinstance(params, list | tuple) or not all(isinstance(one, PoolingParams) for one in params):
        raise ToolkitError(f"pooling_params must be PoolingParams, a list of them or None, got {shown(given)}.")
    if len(params) != count:
        raise ToolkitError(f"pooling_params must be one, or one per prompt ({count}), got {len(params)}.")
    asked = next((one.task for one in params if task is not None and one.task not in (None, task)), None)
    if asked is not None:
        raise ToolkitError(f"task must be {task!r} or None, got {asked!r}.")
    return list(params) if task is None else [one.with_task(task) for one in params]
