"""Folders that are written atomically, and what can go wrong with them as sentences."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.files import sync

_FULL = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122)\b")


def check_free(path: Path) -> None:
    """Raise ToolkitError where ``path`` is something other than a new or an empty folder."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except PermissionError:
        raise ToolkitError(f"path must be a folder that may be read, got {str(path)!r}.") from None
    except OSError as error:
        raise ToolkitError(_sentence(error, path) or f"path must be a folder, got {str(path)!r} ({error}).") from None
    if "\0" in str(path):
        raise ToolkitError(f"path must be what the file system takes, got {str(path)!r}.")
    if taken:
        raise ToolkitError(f"path must be a new or empty folder, got {str(path)!r}.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is flushed to disk and becomes ``path`` when the block ends without an error.

    Raises:
        ToolkitError: it cannot be written, or the disk is full. Nothing is left then, nor after any other error.
    """
    path = path.absolute()
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    made = _missing_parents(path)
    done = False
    try:
        _remove_abandoned(path)
        staging.mkdir(parents=True)
        yield staging
        for file in staging.rglob("*"):
            sync(file)
        sync(staging)
        if path.exists():
            path.rmdir()
        os.replace(staging, path)
        sync(path.parent)
        done = True
    except ToolkitError:
        raise
    except Exception as error:  # safetensors and runtimes wrap the system's errors in their own
        sentence = _sentence(error, path)
        if sentence is None:
            raise
        raise ToolkitError(sentence) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not done:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def _missing_parents(path: Path) -> list[Path]:
    """Folders above ``path`` that are not there, the deepest first."""
    return [folder for folder in path.parents if not folder.exists()]


def _remove_abandoned(path: Path) -> None:
    """Remove what exports to ``path`` left whose processes were killed."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.partial")
    for folder in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(folder.name)
        if match and not _runs(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return process != os.getpid()


def _sentence(error: Exception, path: Path) -> str | None:
    """What the user reads of an error of the file system; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)):
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
        return f"The disk is full: the export to '{path}' needs more than the {free / 1e9:.1f} GB that are free."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"path must be in a folder that may be written, got '{path}'."
    if number == errno.ENOTDIR:
        return f"path must be in a folder, got '{path}', above which a file lies."
    if number == errno.ENAMETOOLONG:
        return f"path must be what the file system takes, got one of {len(str(path))} characters."
    return None
