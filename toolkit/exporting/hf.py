"""A plain Hugging Face checkpoint, as ``save_pretrained`` writes it, with a manifest beside it."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from toolkit.exporting.base import ExportTarget
from toolkit.exporting.completeness import check_towers, checkpoint_folder, left_out
from toolkit.loading import processor_files, write_processor_files
from toolkit.patching import report_of

MANIFEST = "toolkit_manifest.json"


class HuggingFace(ExportTarget, name="hf"):
    """safetensors, config, generation config, tokenizer, processor; a patch's attention does not reach the config.

    Tensors have the names that the checkpoint has; files of the processor are copied from it.
    """

    def write(self, model: Any, folder: Path, tokenizer: Any = None) -> None:
        source = checkpoint_folder(model)
        if source is not None:
            check_towers(model, source)
        model.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_processor_files(processor_files(source), folder)
        (folder / MANIFEST).write_text(json.dumps(manifest(model), indent=2) + "\n")


def manifest(model: Any) -> dict[str, Any]:
    """Versions of all packages that matter, the numerics mode, and the patched roles with their largest probe error."""
    report, source = report_of(model), checkpoint_folder(model)
    lost = left_out(model, source) if source is not None else None
    return {
        "format": "hf",
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "numerics": str(report.numerics) if report else None,
        "roles": report.roles() if report else {},
        "largest_probe_error": report.worst_error() if report else None,
        "left_out": None if lost is None else lost._asdict(),
        "versions": {name: _version(name) for name in ("train-infer-toolkit", "torch", "transformers", "safetensors")},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
