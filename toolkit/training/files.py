"""Files that are whole or absent: written aside, flushed to disk, renamed."""

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
    """Give ``path`` this content; a reader or a crash sees the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync(path.parent)
