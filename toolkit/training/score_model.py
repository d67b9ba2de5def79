"""Models with one score a sequence: a base model's layers with a new head, or a checkpoint of them."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


def make_score_model(config: "PretrainedConfig", dtype: str) -> "PreTrainedModel":
    """A model of random weights with one score. Raises ToolkitError where transformers has none of its type."""
    from transformers import AutoModelForSequenceClassification

    own = copy.deepcopy(config)
    own.num_labels, own.architectures = 1, None
    try:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(own, dtype=getattr(torch, dtype))
    except Exception as error:
        raise ToolkitError(
            f"model must be of a type with a head for sequences in transformers, got {config.model_type} "
            f"({first_line(error)})."
        ) from None
    return model


def load_score_model(
    name_or_path: "str | Path", dtype: str, field: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """A checkpoint with one score, or one that predicts tokens, whose layers get a head from the global generator.

    Raises:
        ToolkitError: no checkpoint, more than one score, or no class of transformers with such a head.
    """
    source = find_source(name_or_path, revision=revision, trust_remote_code=trust_remote_code, field=field)
    if is_score_model(source):
        found: PreTrainedModel = load_weights(source, dtype, runner="pooling")
        if found.config.num_labels != 1:
            raise ToolkitError(
                f"{field} must be a model with one score a sequence, got {found.config.num_labels} labels in "
                f"'{name_or_path}'."
            )
        return found
    base: Any = load_weights(source, dtype)
    model: Any = make_score_model(base.config, dtype)
    part = getattr(base, base.base_model_prefix, None)
    if type(part) is not type(getattr(model, model.base_model_prefix, None)):
        raise ToolkitError(f"{field} must be a model whose layers fit a head for sequences, got {type(base).__name__}.")
    setattr(model, model.base_model_prefix, part)
    model.name_or_path = base.name_or_path
    return model  # type: ignore[no-any-return]


def is_score_model(source: Any) -> bool:
    """Whether a source is of transformers' sequence classification."""
    return any(one.endswith("ForSequenceClassification") for one in _architectures(source))


def _architectures(source: Any) -> Sequence[str]:
    from toolkit.loading.source import CONFIG, read_json

    base = source if source.base is None else source.base
    if base.gguf is not None:
        return ()
    return read_json(base.folder / CONFIG).get("architectures") or ()


def head_modules(model: Any) -> list[str]:
    """Names of a model's modules outside of its layers: those of its head."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def sequence_scores(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[S] the scores of whole sequences, with gradients. Common prefixes are computed once.

    Args:
        model: a patched model with one score a sequence.
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
