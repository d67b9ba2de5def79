"""How sequences are pooled: a model's defaults, and what a request asks for. The names are vLLM's."""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from toolkit.engine.checks import check_bool, check_int, check_names
from toolkit.errors import ToolkitError, must_be_one_of

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
            raise ToolkitError(f"pooler_config must be a PoolerConfig or a mapping of its fields, got {given!r}.")
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
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, also=", -1 or None")
        if self.task is not None and self.task not in TASKS:
            raise ToolkitError(must_be_one_of("task", self.task, TASKS))
        if None not in (self.normalize, self.use_activation) and self.normalize != self.use_activation:
            raise ToolkitError(
                f"normalize must be equal to use_activation where both are given, got {self.normalize} and "
                f"{self.use_activation}."
            )
