"""Tensors that an export takes from the checkpoint as they are, since the model does not hold them."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from toolkit.loading.tensors import INDEX, SINGLE, tensor_headers, weight_files

_NAMES = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_BESIDE = "model-unread.safetensors"


def copy_unread(names: Sequence[str], source: Path, folder: Path) -> None:
    """Add the tensors ``names`` of the checkpoint in ``source`` to the one in ``folder``, and to its index."""
    if not names:
        return
    with ExitStack() as opened:
        handles = [opened.enter_context(safe_open(str(source / name), "pt")) for name in weight_files(source)]
        where = {name: file for file in handles for name in file.keys()}  # noqa: SIM118
        tensors = {name: where[name].get_tensor(name) for name in names}
    bytes_added = sum(tensor.nbytes for tensor in tensors.values())
    if (folder / INDEX).is_file():
        index, added = json.loads((folder / INDEX).read_text()), _BESIDE
    else:  # a file of that name alone would be read
        own = list(tensor_headers(folder))
        main, added = _NAMES
        (folder / SINGLE).rename(folder / main)
        index = {"metadata": {"total_size": (folder / main).stat().st_size}, "weight_map": dict.fromkeys(own, main)}
    save_file(tensors, folder / added, {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(names, added)
    index["metadata"]["total_size"] = index["metadata"].get("total_size", 0) + bytes_added
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
