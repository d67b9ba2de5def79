"""Checkpoints that are written atomically, load in plain transformers, and resume bit for bit.

``checkpoints/step-000100/`` holds a Hugging Face checkpoint (safetensors, config, tokenizer, generation
config), ``training/`` beside it (optimizer and torch RNG as safetensors, everything else as JSON),
``recipe.yaml``, and ``manifest.json`` with the size and SHA-256 of every file. It is written under a
dotted name, flushed to disk and renamed; ``checkpoints/latest`` is then replaced by a file that names it. A
folder with a dotted name is never a checkpoint. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.files import sync, write_atomic
from toolkit.loading.run import BEST, LATEST, name_of, steps_in

MANIFEST = "manifest.json"


def clean(folder: Path) -> None:
    """Remove what interrupted writes and deletions left."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder/step-<step>`` and the latest when the block ends without an error.

    There must be no checkpoint of that step yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, staging = folder / name_of(step), folder / f".{name_of(step)}.new"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    try:
        yield staging
        _seal(staging, step)
        staging.rename(final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync(folder)
    write_atomic(folder / LATEST, final.name + "\n")


def _seal(staging: Path, step: int) -> None:
    """Write the manifest, then flush everything."""
    import platform

    import torch
    import transformers

    import toolkit

    files = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    manifest = {
        "format": 1,
        "step": step,
        "versions": {
            "toolkit": toolkit.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "files": {
            path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in files
        },
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*files, staging / MANIFEST, *(path for path in staging.rglob("*") if path.is_dir()), staging]:
        sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is there with its size and hash.

    Raises ToolkitError naming the first file that is not, and the other checkpoints beside it.
    """
    others = [name_of(step) for step in steps_in(checkpoint.parent) if name_of(step) != checkpoint.name]
    advice = f"; resume from another one with resume_from_checkpoint={others[-1]}" if others else ""

    def corrupt(what: str) -> ToolkitError:
        return ToolkitError(f"Checkpoint {checkpoint} is corrupt: {what}{advice}.")

    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise corrupt(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise corrupt(f"{MANIFEST} is not a manifest") from None
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise corrupt(f"{name} is missing")
        if path.stat().st_size != size:
            raise corrupt(f"{name} has {path.stat().st_size} bytes where {size} were written")
        if _sha256(path) != digest:
            raise corrupt(f"the content of {name} is not what was written")
    return manifest


def drop_after(folder: Path, step: int) -> list[str]:
    """Remove the checkpoints later than ``step`` and make that one the latest; returns the names removed.

    None is the best any more: the run says again which is.
    """
    write_atomic(folder / LATEST, name_of(step) + "\n")
    (folder / BEST).unlink(missing_ok=True)
    dropped = [other for other in steps_in(folder) if other > step]
    for other in dropped:
        _remove(folder / name_of(other))
    return [name_of(other) for other in dropped]


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the last ``keep`` checkpoints, and that of step ``best``."""
    for step in steps_in(folder)[:-keep]:
        if step != best:
            _remove(folder / name_of(step))


def name_best(folder: Path, step: int) -> None:
    """Let the run be opened by the checkpoint of a step."""
    write_atomic(folder / BEST, name_of(step) + "\n")


def _remove(checkpoint: Path) -> None:
    """Rename first, so that what a crash leaves is not taken for a checkpoint."""
    staging = checkpoint.with_name(f".{checkpoint.name}.old")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(staging)
    checkpoint.rename(staging)
    shutil.rmtree(staging)
