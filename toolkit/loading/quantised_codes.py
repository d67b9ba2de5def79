"""Codes and scales beside a checkpoint, whose dense weights are what they stand for."""

import json
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, first_line

CODES = "quantised_weights.safetensors"


def write_codes(model: Any, folder: Path) -> None:
    """Write the quantised weights of a model, one tensor for each part of a weight."""
    from safetensors.torch import save_file

    from toolkit.quantised import quantised_weights

    tensors, kinds = {}, {}
    for name, weight in quantised_weights(model):
        kinds[name] = json.dumps({"format": weight.format, "shape": list(weight.shape)})
        for at, part in enumerate((weight.codes, *weight.scales)):
            tensors[f"{name}/{at}"] = part.detach().cpu().clone()  # weights of NF4 share a table, files nothing
    save_file(tensors, folder / CODES, metadata=kinds)


def read_codes(model: Any, folder: Path) -> None:
    """Put the weights that ``write_codes`` wrote into a dense model, frozen; nothing where a folder has none.

    Raises:
        ToolkitError: a file that is not such a one, or is of another model.
    """
    file = folder / CODES
    if not file.is_file():
        return
    from safetensors import SafetensorError, safe_open
    from torch import nn

    from toolkit.quantised import QuantisedWeight

    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            for name, kind in (tensors.metadata() or {}).items():
                fields = json.loads(kind)
                # Copies, for the loaded tensors may lie at any address.
                parts = [tensors.get_tensor(f"{name}/{at}").clone() for at in range(_count(names, name))]
                path, _, own = name.rpartition(".")
                dense = model.get_parameter(name)
                weight = QuantisedWeight(fields["format"], parts[0], parts[1:], fields["shape"], dense.dtype)
                if weight.shape != dense.shape:
                    raise ValueError(f"{name} has shape {list(weight.shape)} where the model's is {list(dense.shape)}")
                setattr(model.get_submodule(path), own, nn.Parameter(weight, requires_grad=False))
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ToolkitError(f"'{file}' does not hold codes of the model beside it ({first_line(error)}).") from None


def _count(names: list[str], name: str) -> int:
    return sum(one.rpartition("/")[0] == name for one in names)
