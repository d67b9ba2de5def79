"""A plain Hugging Face checkpoint, as ``save_pretrained`` writes it, with a manifest beside it."""

import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from toolkit.patching import report_of

MANIFEST = "toolkit_manifest.json"


def write(model: Any, target: Path, tokenizer: Any = None) -> Path:
    """Write aside, flush to disk, rename. The attention setting that a patch made does not reach the config."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(aside, safe_serialization=True)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        (aside / MANIFEST).write_text(json.dumps(manifest(model), indent=2) + "\n")
        _flush(aside)
        if target.exists():
            target.rmdir()
        os.replace(aside, target)
        _flush_folder(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def manifest(model: Any) -> dict[str, Any]:
    """Versions of everything that made the numbers, the tier, and which roles were patched with which probe error."""
    report = report_of(model)
    return {
        "format": "hf",
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "numerics": str(report.numerics) if report else None,
        "roles": report.roles() if report else {},
        "largest_probe_error": report.worst_error() if report else None,
        "versions": {name: _version(name) for name in ("train-infer-toolkit", "torch", "transformers", "safetensors")},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
