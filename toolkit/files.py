"""Atomic writes: to another name, flushed to disk, renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's or folder's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, mark: str = "new", durable: bool = True) -> Iterator[Path]:
    """A path to write, which takes the place of ``path`` when the block ends; nothing of it is left after an error.

    Args:
        path: of the file.
        mark: in the name that is written to; writers at the same time need others.
        durable: whether file and folder are flushed to disk.
    """
    staging = path.with_name(f".{path.name}.{mark}")
    try:
        yield staging
        if durable:
            sync(staging)
        os.replace(staging, path)
    except BaseException:
        with suppress(OSError):
            staging.unlink()
        raise
    if durable:
        sync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Give ``path`` this content; after a crash it has the old content or the new, never a part."""
    with replacing(path) as staging:
        staging.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
