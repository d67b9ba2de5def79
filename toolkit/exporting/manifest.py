"""The manifest of an export: what it was made of, its files, and what its consumer generated."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from toolkit.exporting.base import ConsumerOutput, ExportJob
from toolkit.exporting.completeness import checkpoint_folder, left_out
from toolkit.patching import report_of, weight_version

MANIFEST = "toolkit_manifest.json"
_ALWAYS = ("train-infer-toolkit", "torch", "transformers", "safetensors", "tokenizers")
_OF_MODULES = {"gguf": "gguf", "compressed_tensors": "compressed-tensors"}


def manifest(
    job: ExportJob,
    target: str,
    modules: Sequence[str],
    folder: Path,
    prompts: Sequence[Sequence[int]],
    output: ConsumerOutput | None,
) -> dict[str, Any]:
    """Everything that says where an export comes from and what it was seen to do.

    Args:
        target: the name of it.
        modules: what it was written with, beside the toolkit's own dependencies.
        folder: with the files of the export, which are hashed.
        prompts: that the consumer was given, as token ids.
        output: what it generated; None where it did not run.
    """
    model = job.model
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    report, source = report_of(model), checkpoint_folder(base)
    lost = left_out(base, source, folder) if source is not None else None
    return {
        "format": target,
        "quantise": job.quantise,
        "imatrix": None if job.imatrix is None else job.imatrix.name,
        "source": getattr(base, "name_or_path", None) or None,
        "weight_version": weight_version(model) if report else None,
        "architecture": type(base).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "numerics": str(report.numerics) if report else None,
        "roles": report.roles() if report else {},
        "largest_probe_error": report.worst_error() if report else None,
        "left_out": None if lost is None else lost._asdict(),
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in (*_ALWAYS, *(_OF_MODULES.get(one, one) for one in modules))},
        },
        "files": {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
        "proof": None
        if output is None
        else {
            "consumer": output.consumer,
            "prompts": [list(prompt) for prompt in prompts],
            "outputs": output.outputs,
        },
    }


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is not."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
