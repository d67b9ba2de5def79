"""Blocks of cached prefixes in files of a folder, which end with the process that wrote them."""

import fcntl
import os
import shutil
import tempfile
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from toolkit.state.offloading.entries import Entry, EntryId
from toolkit.state.offloading.files import read_entries, write_entries
from toolkit.state.prefix_key import PrefixKey, WeightKeys

_PREFIX = "toolkit-kv-"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    key: PrefixKey
    bytes: int


class DiskCache:
    """Entries in files, one each, least recently used out first.

    Its folder is a new one in ``folder``, which it locks while it lives, and removes. Those that other processes left
    behind when they were killed are removed first: nobody holds their locks.

    Args:
        capacity: bytes of files; None for no bound.
        folder: where its folder is made; it is made too.
        sizes: bytes of a block of each group.

    Attributes:
        bytes: in use.
        hits: blocks that were read back.
        evictions: blocks that made room for others.
        failures: blocks that could not be written, or that were damaged when they were read.

    Raises:
        OSError: for a folder that cannot be written.
    """

    def __init__(self, capacity: int | None, folder: Path, sizes: Sequence[int]) -> None:
        self.capacity = capacity
        self.bytes = self.hits = self.evictions = self.failures = 0
        self._sizes = sizes
        self._files: OrderedDict[EntryId, _File] = OrderedDict()
        self._fingerprint = uuid.uuid4().hex
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_PREFIX}*"):
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        held = _lock(self.folder, make=True)
        self._close = weakref.finalize(self, _remove, self.folder, held, os.getpid())

    def __len__(self) -> int:
        return len(self._files)

    def has(self, entry: EntryId, key: PrefixKey) -> bool:
        """Whether it has the block, computed under ``key``."""
        found = self._files.get(entry)
        return found is not None and found.key == key

    def get(self, entry: EntryId) -> Tensor | None:
        """The content of a block that it has; None, and it is forgotten, where its file is damaged."""
        content = self._read(entry)
        if content is None:
            self._drop(entry)
            self.failures += 1
            return None
        self._files.move_to_end(entry)
        self.hits += 1
        return content

    def put(self, entry: Entry) -> None:
        """Keep a block, as the most recently used one, while there is room."""
        if self.has(entry.id, entry.key):
            self._files.move_to_end(entry.id)
            return
        self._drop(entry.id)
        path = self.folder / f"{self._count}.safetensors"
        self._count += 1
        try:
            size = write_entries(path, [entry], self._fingerprint)
        except OSError:  # the device is full, say: the state is computed again then
            self.failures += 1
            return
        self._files[entry.id] = _File(path, entry.key, size)
        self.bytes += size
        while self.capacity is not None and self.bytes > self.capacity:
            self._drop(next(iter(self._files)))
            self.evictions += 1

    def entries(self) -> Iterator[Entry]:
        """All that can be read, least recently used first."""
        for one in list(self._files):
            content = self._read(one)
            if content is not None:
                yield Entry(one, self._files[one].key, content)

    def drop_outdated(self, current: PrefixKey | WeightKeys) -> None:
        """Forget what ``current`` outdates."""
        for one in [one for one, file in self._files.items() if current.outdates(file.key)]:
            self._drop(one)

    def clear(self) -> None:
        """Forget everything."""
        for one in list(self._files):
            self._drop(one)

    def close(self) -> None:
        """Forget everything and remove the folder."""
        self.clear()
        self._close()

    def check_integrity(self) -> None:
        """Raise AssertionError where bytes or files do not add up."""
        assert self.bytes == sum(one.bytes for one in self._files.values()), "bytes of the disk cache"
        assert self.capacity is None or self.bytes <= self.capacity, "the disk cache is beyond its capacity"
        if self._close.alive:
            there = {path for path in self.folder.iterdir() if path.suffix == ".safetensors"}
            assert there == {one.path for one in self._files.values()}, "files of the disk cache"

    def _read(self, entry: EntryId) -> Tensor | None:
        file = self._files[entry]
        read, _ = read_entries(file.path, self._fingerprint, {file.key.adapter: file.key}, self._sizes)
        return read[0].content if len(read) == 1 and (read[0].id, read[0].key) == (entry, file.key) else None

    def _drop(self, entry: EntryId) -> None:
        dropped = self._files.pop(entry, None)
        if dropped is not None:
            dropped.path.unlink(missing_ok=True)
            self.bytes -= dropped.bytes


def _lock(folder: Path, make: bool = False) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None where another process, or cache, does."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | (os.O_CREAT if make else 0))
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(folder: Path, lock: int | None, process: int) -> None:
    if os.getpid() != process:  # a fork of the one that it belongs to
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
