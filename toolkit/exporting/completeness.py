"""Whether a model holds all that its checkpoint holds, so that an export loses nothing without a word."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.errors import ToolkitError
from toolkit.loading.source import CONFIG, find_source, read_json
from toolkit.loading.tensors import tensor_shapes
from toolkit.patching.mtp import mtp_tensors


def checkpoint_folder(model: Any) -> Path | None:
    """The folder that the model was loaded from, None for a model that was made or whose folder is gone."""
    name = getattr(model, "name_or_path", None) or ""
    if not name:
        return None
    try:
        source = find_source(name, cached=True)
    except ToolkitError:
        return None
    return source.folder if source.gguf is None and (source.folder / CONFIG).is_file() else None


def check_towers(model: Any, folder: Path) -> None:
    """Raise ToolkitError where the checkpoint is of a class with towers and the model of one without them."""
    config = read_json(folder / CONFIG)
    written_by = config.get("architectures") or []
    if type(model).__name__ in written_by or not written_by:
        return
    towers = [name for name, value in config.items() if _is_tower(name, value)]
    if not towers:
        return
    missing = [name for name in towers if not hasattr(model.config, name)]
    shapes = tensor_shapes(folder)
    kept = sum(tensor.numel() for tensor in model.state_dict().values())
    if missing or sum(_numel(shape) for shape in shapes.values()) > kept:
        raise ToolkitError(
            f"model must be a {written_by[0]}, as the checkpoint in '{folder}', to be exported with its "
            f"{' and '.join(missing or towers)}, got a {type(model).__name__}; load it with toolkit.loading.load_model "
            "or AutoModelForMultimodalLM."
        )


class LeftOut(NamedTuple):
    """Tensors of a checkpoint that an export does not have. first: the name of one of them."""

    tensors: int
    first: str


def left_out(model: Any, source: Path, folder: Path) -> LeftOut | None:
    """Tensors of the checkpoint that the model's class does not read, and that the export in ``folder`` lacks."""
    there = tensor_shapes(folder)
    names = [name for name in unread_tensors(model, source) if name not in there]
    return LeftOut(len(names), names[0]) if names else None


def unread_tensors(model: Any, folder: Path) -> list[str]:
    """Names of the checkpoint's tensors that transformers' class leaves out: multi-token prediction layers, say."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    names = sorted(tensor_shapes(folder))
    ahead = set(mtp_tensors(names, model.config.get_text_config().num_hidden_layers))
    kept = model.state_dict().keys()
    return [one for one in names if one not in kept and (one in ahead or any(p.search(one) for p in patterns))]


def _is_tower(name: str, value: Any) -> bool:
    return name.endswith("_config") and name != "text_config" and isinstance(value, dict) and "model_type" in value


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
