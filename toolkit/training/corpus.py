"""Text files as documents: which there are, which are held out, in which order an epoch sees them.

Everything here depends on file names, sizes and seeds only, never on directory order, the clock or the
process, so that two processes (or a resumed one) agree without talking.
"""

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from toolkit.config.schema import DataSection
from toolkit.errors import ToolkitError


@dataclass(frozen=True)
class SourceFile:
    """One document: its name (relative, with ``/``), where it is, and its size in bytes."""

    name: str
    path: str
    size: int

    def read(self) -> str:
        """The text without a byte order mark. Bytes that are not UTF-8 read as U+FFFD; line ends stay as they are."""
        return Path(self.path).read_bytes().decode("utf-8-sig", "replace")


def digest(text: str) -> int:
    """A 64-bit hash that is the same in every process, platform and version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def list_files(data: DataSection) -> list[SourceFile]:
    """The non-empty files under ``data.data_dir`` that match, by name; links to folders are not followed."""
    root = sysconfig.get_path("stdlib") if data.data_dir == "stdlib" else data.data_dir
    if not os.path.isdir(root):
        raise ToolkitError(f"data.data_dir must be a folder or 'stdlib', got '{data.data_dir}'.")
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in data.exclude]
        for name in names:
            path = os.path.join(folder, name)
            if any(fnmatch(name, pattern) for pattern in data.include) and os.path.isfile(path):
                size = os.path.getsize(path)
                if size:
                    files.append(SourceFile(os.path.relpath(path, root).replace(os.sep, "/"), path, size))
    if not files:
        raise ToolkitError(
            f"data.data_dir must hold a non-empty file that matches {data.include}, got '{data.data_dir}'."
        )
    return sorted(files, key=lambda file: file.name)


def split(files: Sequence[SourceFile], val_set_size: float) -> tuple[list[SourceFile], list[SourceFile]]:
    """(training, held-out) files. A file is held out when hash(name) / 2^64 < ``val_set_size``, so the split
    of a file does not depend on other files."""
    threshold = int(val_set_size * 2**64)
    sides: tuple[list[SourceFile], list[SourceFile]] = ([], [])
    for file in files:
        sides[digest(file.name) < threshold].append(file)
    for side, files_of_side in zip(("training", "held-out"), sides, strict=True):
        if not files_of_side:
            raise ToolkitError(
                f"data.val_set_size must leave a file on the {side} side, got {val_set_size} of {len(files)} files."
            )
    return sides


def in_hash_order(files: Sequence[SourceFile], salt: str) -> list[SourceFile]:
    """The files in an order that depends on ``salt`` and the names only."""
    return sorted(files, key=lambda file: (digest(f"{salt}/{file.name}"), file.name))


def take_bytes(files: Sequence[SourceFile], budget: int | None) -> list[SourceFile]:
    """Whole files in hash order that fit ``budget`` bytes (a file too large is passed over), at least one."""
    ordered = in_hash_order(files, "take")
    if budget is None:
        return ordered
    taken, total = [], 0
    for file in ordered:
        if total + file.size <= budget:
            taken.append(file)
            total += file.size
    return taken or [min(ordered, key=lambda file: file.size)]


def fingerprint(files: Sequence[SourceFile]) -> str:
    """Names and sizes as one hash: a data position means something only for the same files."""
    listing = "\n".join(f"{file.name} {file.size}" for file in files)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
