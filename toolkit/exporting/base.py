"""What an export target is, and folders that are written atomically."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.files import sync
from toolkit.registry import Registry


class ExportTarget(ABC):
    """A format of other programs. ``class HuggingFace(ExportTarget, name="hf")`` registers it under a name."""

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            TARGETS.add(name, cls)

    @abstractmethod
    def write(self, model: Any, folder: Path, tokenizer: Any = None) -> None:
        """Write the model, and the tokenizer if there is one, into the new, empty ``folder``."""


TARGETS: Registry[ExportTarget] = Registry("toolkit.exporting")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is flushed to disk and becomes ``path`` when the block ends without an error."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for file in staging.rglob("*"):
            sync(file)
        sync(staging)
        if path.exists():
            path.rmdir()
        os.replace(staging, path)
        sync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
