"""How a folder says that its model is pooled: the files of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.loading.source import Source, read_json

MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"
_OTHERS = (SETTINGS, "config_sentence_transformers.json")
_OF_MODULES = ("config.json", "model.safetensors")
# Fields of the pooling's configuration, and the pooling types that are served.
_MODES = {"pooling_mode_cls_token": "CLS", "pooling_mode_mean_tokens": "MEAN", "pooling_mode_lasttoken": "LAST"}
_NAMED = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}
_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "Sigmoid": "sigmoid"}


def pooler_settings(source: Source) -> dict[str, Any] | None:
    """Fields of a ``PoolerConfig``, and ``max_model_len`` where there is one; None where the folder has no such files.

    Raises:
        ToolkitError: a module or a kind of pooling that is not served.
    """
    file = source.folder / MODULES
    if source.gguf is not None or not file.is_file():
        return None
    found: dict[str, Any] = {"normalize": False, "projections": []}
    for at, module in enumerate(_modules(file)):
        kind, folder = str(module.get("type", "")).rsplit(".", 1)[-1], source.folder / str(module.get("path", ""))
        if kind == "Transformer" and at == 0 and folder == source.folder:
            continue
        if kind == "Pooling":
            found["pooling_type"] = _pooling_type(folder / "config.json")
        elif kind == "Normalize":
            found["normalize"] = True
        elif kind == "Dense" and not found["normalize"]:
            found["projections"].append(_dense(folder))
        else:
            raise ToolkitError(
                f"'{file}' must have the modules Transformer (in its own folder), Pooling, Dense and Normalize in "
                f"order, got {module.get('type')!r} in {module.get('path')!r}."
            )
    settings = source.folder / SETTINGS
    if settings.is_file():
        given = read_json(settings)
        if given.get("do_lower_case"):
            raise ToolkitError(f"do_lower_case in '{settings}' must be false; put it into the tokenizer, got true.")
        if given.get("max_seq_length"):
            found["max_model_len"] = int(given["max_seq_length"])
    return found


def pooling_files(folder: Path | None) -> dict[str, bytes]:
    """The files that say how a folder's model is pooled, by their path in it; none without them."""
    if folder is None or not (folder / MODULES).is_file():
        return {}
    inside = [str(module["path"]) for module in _modules(folder / MODULES) if module.get("path")]
    names = [MODULES, *_OTHERS, *(f"{module}/{name}" for module in inside for name in _OF_MODULES)]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _modules(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ToolkitError(f"'{file}' must be a JSON list of modules.")
    return found


def _pooling_type(file: Path) -> str:
    given = read_json(file)
    named = given.get("pooling_mode")
    modes = [named] if isinstance(named, str) else [
        name for name, value in given.items() if name.startswith("pooling_mode_") and value is True
    ]  # fmt: skip
    kinds = [(_NAMED | _MODES).get(mode) for mode in modes]
    if len(kinds) != 1 or kinds[0] is None:
        raise ToolkitError(
            f"'{file}' must ask for one of cls, mean and lasttoken pooling, got {', '.join(map(str, modes)) or 'none'}."
        )
    return kinds[0]


def _dense(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    given = read_json(folder / "config.json")
    named = str(given.get("activation_function", "Identity")).rsplit(".", 1)[-1]
    if named not in _ACTIVATIONS:
        field = f"activation_function in '{folder / 'config.json'}'"
        raise ToolkitError(f"{field} must be one of {', '.join(_ACTIVATIONS)}, got {named!r}.")
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ToolkitError(f"'{folder}' has no model.safetensors.")
    tensors = load_file(file)
    return {
        "weight": tensors["linear.weight"], "bias": tensors.get("linear.bias"), "activation": _ACTIVATIONS[named],
    }  # fmt: skip
