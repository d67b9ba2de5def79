"""Atomic writes: to a temporary name, flushed to disk, renamed."""

import contextlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's or folder's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Give ``path`` this content; after a crash it has the old content or the new, never a part."""
    staging = path.with_name(f".{path.name}.new")
    try:
        staging.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        sync(staging)
        os.replace(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise
    sync(path.parent)
