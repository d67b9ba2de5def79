"""From the hidden states or logits of one sequence to what is returned for it.

Each function sees one sequence alone, so no bit depends on what else is in a batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine.pooling.params import Projection
from toolkit.errors import ToolkitError

_DENSE: dict[str, Any] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}
# What sentence-transformers writes for the activation of a cross-encoder, by the last part of the class' name.
_NAMED = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}


def pool(kind: str, hidden: Tensor) -> Tensor:
    """[H] of the hidden states [n, H] of a sequence; [n, H] with ALL.

    LAST is the last token's, CLS the first one's, MEAN the sum over all tokens divided by n, added up in float64.
    """
    if kind == "MEAN":
        return hidden.double().mean(0).to(hidden.dtype)
    return hidden if kind == "ALL" else hidden[-1 if kind == "LAST" else 0]


def embed(pooled: Tensor, projections: Sequence[Projection], dimensions: int | None, normalize: bool) -> Tensor:
    """The embedding [D] of pooled hidden states [H], or [n, D] of [n, H]: projected, cut, then divided by its length.

    Half types are computed in float32. An embedding of zeros stays one.
    """
    x = pooled if pooled.dtype == torch.float64 else pooled.float()
    for one in projections:
        x = _DENSE[one.activation](F.linear(x, one.weight.to(x), None if one.bias is None else one.bias.to(x)))
    x = x[..., :dimensions]
    return F.normalize(x, dim=-1) if normalize else x


def activate(logits: Tensor, activation: str) -> Tensor:
    """Scores of logits [..., N], in float32 for half types."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    if activation == "identity":
        return x
    return torch.sigmoid(x) if activation == "sigmoid" else x.softmax(-1)


def default_activation(config: Any, of_tokens: bool) -> str:
    """The activation of a classifier's logits, as transformers' pipelines and sentence-transformers choose it.

    Args:
        config: of the model.
        of_tokens: whether the logits are of each token, for which there is no ``problem_type``.
    """
    nested = getattr(config, "sentence_transformers", None) or {}
    named = nested.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    if named is not None:
        name = str(named).rsplit(".", 1)[-1]
        if name not in _NAMED:
            raise ToolkitError(
                f"the activation of the model's configuration must be one of {', '.join(_NAMED)}, got {named!r}; give "
                "pooler_config={'activation': ...}."
            )
        return _NAMED[name]
    problem = None if of_tokens else getattr(config, "problem_type", None)
    if problem == "regression":
        return "identity"
    single = getattr(config, "num_labels", 2) == 1
    return "sigmoid" if problem == "multi_label_classification" or single else "softmax"
