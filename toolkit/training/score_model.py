"""Models with scores in the place of tokens: a base model's layers with a new head, or a checkpoint of them."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, first_line
from toolkit.loading import find_source, load_weights
from toolkit.ops.take_rows import take_rows
from toolkit.patching import choose_rotary_lengths
from toolkit.patching.forward import hidden_states
from toolkit.patching.pooled_head import head_outputs
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel


class Head(NamedTuple):
    """What a model has in the place of its head of tokens.

    Args:
        loader: the auto class of transformers.
        architecture: how the names of its classes end.
        labels: outputs.
        what: a sentence's name for it.
        of_tokens: whether it has outputs for each token.
    """

    loader: str
    architecture: str
    labels: int
    what: str
    of_tokens: bool


HEADS = {
    "score": Head("AutoModelForSequenceClassification", "ForSequenceClassification", 1, "one score a sequence", False),
    "token_classes": Head(
        "AutoModelForTokenClassification", "ForTokenClassification", 2, "two classes for each token", True
    ),
}
"""By ``Objective.head``."""


def make_score_model(config: "PretrainedConfig", dtype: str, head: str = "score") -> "PreTrainedModel":
    """A model of random weights with a head of ``HEADS``, without dropout before it.

    Raises ToolkitError where transformers has none of its type.
    """
    import transformers

    kind, own = HEADS[head], copy.deepcopy(config)
    own.num_labels, own.architectures = kind.labels, None
    if kind.of_tokens:
        own.classifier_dropout = 0.0  # 0.1 where a configuration says nothing
    try:
        model: PreTrainedModel = getattr(transformers, kind.loader).from_config(own, dtype=getattr(torch, dtype))
    except Exception as error:
        raise ToolkitError(
            f"model must be of a type with a head of {kind.what} in transformers, got {config.model_type} "
            f"({first_line(error)})."
        ) from None
    return model


def load_score_model(
    name_or_path: "str | Path",
    dtype: str,
    field: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    head: str = "score",
) -> "PreTrainedModel":
    """A checkpoint with a head of ``HEADS``, or one that predicts tokens, whose layers get a head from the global
    generator.

    Raises:
        ToolkitError: no checkpoint, another number of outputs, or no class of transformers with such a head.
    """
    kind = HEADS[head]
    source = find_source(name_or_path, revision=revision, trust_remote_code=trust_remote_code, field=field)
    if has_head_of(source, head):
        found: PreTrainedModel = load_weights(source, dtype, runner="pooling")
        if found.config.num_labels != kind.labels:
            raise ToolkitError(
                f"{field} must be a model with {kind.what}, got {found.config.num_labels} labels in '{name_or_path}'."
            )
        return found
    base: Any = load_weights(source, dtype)
    model: Any = make_score_model(base.config, dtype, head)
    part = getattr(base, base.base_model_prefix, None)
    if type(part) is not type(getattr(model, model.base_model_prefix, None)):
        raise ToolkitError(
            f"{field} must be a model whose layers fit a head of {kind.what}, got {type(base).__name__}."
        )
    setattr(model, model.base_model_prefix, part)
    model.name_or_path = base.name_or_path
    return model  # type: ignore[no-any-return]


def is_score_model(source: Any) -> bool:
    """Whether a source is of transformers' sequence classification."""
    return has_head_of(source, "score")


def has_head_of(source: Any, head: str) -> bool:
    """Whether a source has a head of ``HEADS``."""
    return any(one.endswith(HEADS[head].architecture) for one in _architectures(source))


def check_scores(model: Any, head: str) -> None:
    """Prove the head of a patched model on ragged batches.

    Raises:
        ToolkitError: it computes something else there, or has outputs for each token where they are of a sequence, or
            the other way round.
    """
    from toolkit.patching.pooled_head import check_head

    kind = HEADS[head]
    if check_head(model) is not kind.of_tokens:
        other = "a sequence" if kind.of_tokens else "a token"
        raise ToolkitError(
            f"model.name_or_path must be a model with {kind.what}, got {type(model).__name__} with outputs of {other}."
        )


def _architectures(source: Any) -> Sequence[str]:
    from toolkit.loading.source import CONFIG, read_json

    base = source if source.base is None else source.base
    if base.gguf is not None:
        return ()
    return read_json(base.folder / CONFIG).get("architectures") or ()


def head_modules(model: Any) -> list[str]:
    """Names of a model's modules with weights outside of its layers: those of its head."""
    modules = model.named_children()
    return [name for name, one in modules if name != model.base_model_prefix and any(True for _ in one.parameters())]


def sequence_scores(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[S] the scores of whole sequences, or [T, N] those of all their tokens, with gradients.

    Common prefixes are computed once.

    Args:
        model: a patched model with a head of ``HEADS``.
        sequences: token ids of each.
    """
    device = next(model.parameters()).device
    lengths = [len(one) for one in sequences]
    batch = RaggedBatch.from_sequences(
        [torch.tensor(one) for one in sequences], device, rotary_lengths=choose_rotary_lengths(model, lengths)
    )
    hidden = hidden_states(model, DenseContext(batch))
    rows = hidden if batch.sample_rows is None else take_rows(hidden, batch.sample_rows)
    scores = [
        head_outputs(model, torch.tensor(ids, device=device), part) for ids, part in zip(sequences, rows.split(lengths))
    ]
    return torch.cat(scores)
