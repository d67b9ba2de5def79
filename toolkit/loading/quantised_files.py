"""Checkpoints of quantised weights, read from their files without the library that wrote them, and without a GPU.

Linear layers keep their codes (``toolkit.quantised``). What has no linear layer of its name in the model, as experts
that transformers joins to one tensor, is dequantised.
"""

from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.loading.tensors import weight_files

GENERATION_CONFIG = "generation_config.json"


def is_readable(config: Any) -> bool:
    """Whether the files of a configuration are in a layout that is read here."""
    from toolkit.quantised.adopt import library_of, settings_of

    return library_of(settings_of(config)) is not None


def load_quantised(opener: Any, folder: Path, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(model, report of loading) of a folder, as ``from_pretrained(output_loading_info=True)`` returns them.

    Args:
        opener: auto class of transformers.
        config: of the folder, whose ``quantization_config`` is removed.
        options: keywords of ``from_pretrained``.

    Raises:
        ToolkitError: a layer in a layout that no format holds.
    """
    import torch
    from torch import nn
    from transformers import GenerationConfig

    from toolkit.quantised import QuantisedWeight
    from toolkit.quantised.adopt import library_of, settings_of

    settings = settings_of(config)
    library = library_of(settings)
    assert library is not None
    del config.quantization_config
    tensors = _read(folder)
    layers = library.layers(list(tensors))
    quantised: dict[str, QuantisedWeight] = {}
    for path, names in layers.items():
        parts = {name: tensors.pop(f"{path}.{name}") for name in names if name != "bias"}
        try:
            quantised[f"{path}.weight"] = library.read(settings, parts, options["dtype"])
        except ToolkitError as error:
            raise ToolkitError(f"layer {path} cannot be read: {error}") from None
    with torch.device("meta"):
        skeleton = opener.from_config(config, trust_remote_code=options.get("trust_remote_code", False))
    shapes = {
        f"{path}.weight": tuple(module.weight.shape)
        for path, module in skeleton.named_modules()
        if type(module) is nn.Linear
    }
    kept = {name for name, weight in quantised.items() if shapes.get(name) == tuple(weight.shape)}
    for name, weight in quantised.items():
        # Of a layer that keeps its codes nothing but the shape is read.
        tensors[name] = (
            torch.zeros((), dtype=weight.dtype).expand(weight.shape) if name in kept else weight.dequantise()
        )
    kinds = {name: options[name] for name in ("dtype", "output_loading_info") if name in options}
    model, report = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, **kinds)
    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for name in kept:
        path = name.rpartition(".")[0]
        model.get_submodule(path).weight = nn.Parameter(quantised[name], requires_grad=False)
    return model, report


def _read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for name in weight_files(folder):
        found |= load_file(folder / name)
    return found
