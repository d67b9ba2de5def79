"""Weights of a folder for a model that is loaded already."""

import os
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError
from toolkit.loading.model import DTYPES, load_weights, read_config
from toolkit.loading.source import ADAPTER, CONFIG, Source, find_source
from toolkit.loading.tensors import tensor_headers
from toolkit.sentences import shown
from toolkit.whole_shapes import whole_shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

_OTHERWISE_USED = (
    "_name_or_path", "architectures", "attn_implementation", "dtype", "torch_dtype", "transformers_version",
    "use_cache",
)  # fmt: skip
"""Fields of a configuration that change nothing that the weights mean; so do those of token ids."""
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_new_weights(folder: str, model: "nn.Module", field: str = "weight_dir") -> "dict[str, Tensor]":
    """The state dict of ``model`` with the weights of a folder, on the CPU; ``model`` stays as it is.

    The folder is read as a model is at start, so the tensors are those of a process that loads it: converted to the
    dtype of ``model``, with the names and the layout of its parameters. It takes as much memory as the model.

    Args:
        folder: with safetensors files, as ``save_pretrained`` writes them; without a ``config.json`` it is read by that
            of ``model``. A folder of PEFT adapters gives their base model with the adapters merged.
        model: that is loaded.
        field: what the user calls ``folder``, for error sentences.

    Raises:
        ToolkitError: what is missing, corrupt or does not fit.
    """
    path = Path(folder)
    if not os.path.isdir(folder):  # false for what is no path at all; "" is none, and not the working folder
        raise ToolkitError(f"{field} must be a folder that this server can read, got {shown(folder)}.")
    config: Any = model.config
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    dtype = counts.most_common(1)[0][0]  # some models keep a few in float32
    if dtype not in DTYPES:
        raise ToolkitError(f"the served model must have weights of {', '.join(DTYPES)}, got {dtype}.")
    if (path / CONFIG).is_file() or (path / ADAPTER).is_file():
        source, given = find_source(path, field=field), None
        base = source.whole
        _check_config(base, config, field)
    else:
        source, given = Source(path), deepcopy(config)
        base = source
    if base is source:
        _check_tensors(path, model, field)
    return dict(load_weights(source, dtype, config=given).state_dict())


def _check_tensors(folder: Path, model: "nn.Module", field: str) -> None:
    """Raise ToolkitError for a tensor of another shape or kind than the model's of its name.

    Checkpoints may hold tensors under other names than the model's; those are compared when they are converted.
    """
    state, split = model.state_dict(), whole_shapes(model)
    for name, (dtype, shape) in tensor_headers(folder).items():
        there = state.get(name)
        if there is None:
            continue
        wanted = split.get(name, list(there.shape))  # over all ranks
        if list(shape) != wanted:
            raise ToolkitError(f"{field} must have {name} of the shape {wanted}, got {list(shape)}.")
        if there.is_floating_point() and dtype not in _FLOATS:
            raise ToolkitError(f"{field} must have {name} of a dtype among {', '.join(_FLOATS)}, got {dtype}.")


def _check_config(source: Source, config: Any, field: str) -> None:
    """Raise ToolkitError where the weights of ``source`` belong to another model than that of ``config``."""
    if source.gguf is not None:
        raise ToolkitError(f"{field} must be a folder of safetensors files, got {shown(str(source.folder))}.")
    theirs, ours = read_config(source).to_dict(), config.to_dict()
    for name in sorted({*theirs, *ours}):
        if name in _OTHERWISE_USED or name.endswith(("_token_id", "_token_ids")):
            continue
        if theirs.get(name) != ours.get(name):
            raise ToolkitError(
                f"{field} must have a {CONFIG} with {name} {shown(ours.get(name))}, as the served model, got "
                f"{shown(theirs.get(name))}."
            )
