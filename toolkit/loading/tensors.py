"""Tensors of a folder's safetensors files, from their headers: names and shapes, nothing loaded."""

import json
import struct
from pathlib import Path

from toolkit.errors import ToolkitError, first_line
from toolkit.loading.source import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a model's weights.

    Raises:
        ToolkitError: a malformed index, or one that names files outside of the folder.
    """
    if not (folder / INDEX).is_file():
        return [SINGLE]
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ToolkitError(f"'{folder / INDEX}' has no weight_map of tensors to files.")
    names = sorted(set(shards.values()))
    if any(Path(name).name != name for name in names):
        raise ToolkitError(f"'{folder / INDEX}' names files outside of its folder.")
    return names


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name; empty where a file is missing. Raises as ``tensor_headers``."""
    return {name: shape for name, (_, shape) in tensor_headers(folder).items()}


def tensor_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype such as "BF16", shape) of every tensor by its name; empty where a file is missing.

    Raises:
        ToolkitError: a file is not safetensors.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in weight_files(folder):
        try:
            with (folder / name).open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
        except FileNotFoundError:
            return {}
        except (ValueError, OSError, struct.error) as error:
            raise ToolkitError(f"'{folder / name}' is not a safetensors file ({first_line(error)}).") from None
        for key, value in header.items():
            if key != "__metadata__":
                found[key] = value["dtype"], tuple(value["shape"])
    return found
