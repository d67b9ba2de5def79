"""Export a patched model to the formats that other engines open; one file a target."""

import importlib
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, nearest

FORMATS = {"hf": "toolkit.exporting.hf"}


def export(model: Any, path: str | Path, format: str = "hf", tokenizer: Any = None) -> Path:
    """Write ``model`` to the new folder ``path`` in ``format``; the folder appears whole or not at all.

    format: "hf" is a plain Hugging Face checkpoint (safetensors, config, generation config, manifest of versions and
    numerics; the tokenizer's files when one is given), which unpatched transformers opens.
    Raises ToolkitError for an unknown format and for a path that already holds something.
    """
    if format not in FORMATS:
        raise ToolkitError(f"format is {format!r}; allowed are {', '.join(FORMATS)}{nearest(format, list(FORMATS))}.")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ToolkitError(f"path {str(path)!r} already exists; allowed is a new or empty folder.")
    return importlib.import_module(FORMATS[format]).write(model, target, tokenizer)
