"""Export a patched model to the formats that other engines open; one file per target."""

from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.exporting.base import TARGETS, ExportTarget, new_folder

__all__ = ["TARGETS", "ExportTarget", "export"]


def export(model: Any, path: str | Path, format: str = "hf", tokenizer: Any = None) -> Path:
    """The folder ``path`` with ``model`` in ``format``, written atomically.

    Args:
        model: a model of transformers, patched or not.
        path: a new or empty folder.
        format: the name of a target. "hf" is a plain Hugging Face checkpoint (safetensors, config, generation config,
            manifest of versions and numerics; the tokenizer's files when one is given, and those of the checkpoint's
            processor), which unpatched transformers opens.
        tokenizer: saved beside the model.

    Raises:
        ToolkitError: an unknown format, a path that already holds something, or a model of a class without the towers
            that its checkpoint has.
    """
    target = TARGETS.find("format", format)()
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ToolkitError(f"path must be a new or empty folder, got {str(path)!r}.")
    with new_folder(folder) as staging:
        target.write(model, staging, tokenizer)
    return folder
