"""Blocks of cached prefixes in host memory, as many bytes as it has room for, least recently used out first."""

from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor

from toolkit.state.offloading.entries import Entry, EntryId
from toolkit.state.prefix_key import PrefixKey, WeightKeys


class HostCache:
    """Entries in host memory.

    Args:
        capacity: bytes; None for no bound.

    Attributes:
        bytes: in use.
        hits: blocks that were read back.
        evictions: blocks that made room for others.
    """

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.bytes = self.hits = self.evictions = 0
        self._entries: OrderedDict[EntryId, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, entry: EntryId, key: PrefixKey) -> bool:
        """Whether it has the block, computed under ``key``."""
        found = self._entries.get(entry)
        return found is not None and found.key == key

    def touch(self, entry: EntryId) -> None:
        """A block is the most recently used one."""
        self._entries.move_to_end(entry)

    def get(self, entry: EntryId) -> Tensor:
        """The content of a block that it has."""
        self.touch(entry)
        self.hits += 1
        return self._entries[entry].content

    def put(self, entry: Entry) -> list[Entry]:
        """Keep a block, as the most recently used one; what has no room any more, or itself where it never has."""
        self._drop(entry.id)
        if self.capacity is not None and entry.content.nbytes > self.capacity:
            return [entry]
        self._entries[entry.id] = entry
        self.bytes += entry.content.nbytes
        out = []
        while self.capacity is not None and self.bytes > self.capacity:
            out.append(self._drop(next(iter(self._entries))))
        self.evictions += len(out)
        return [one for one in out if one is not None]

    def entries(self) -> Iterable[Entry]:
        """All of them, least recently used first."""
        return list(self._entries.values())

    def drop_outdated(self, current: PrefixKey | WeightKeys) -> None:
        """Forget what ``current`` outdates."""
        for one in [one for one, entry in self._entries.items() if current.outdates(entry.key)]:
            self._drop(one)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.bytes = 0

    def check_integrity(self) -> None:
        """Raise AssertionError where bytes do not add up."""
        assert self.bytes == sum(one.content.nbytes for one in self._entries.values()), "bytes of the host cache"
        assert self.capacity is None or self.bytes <= self.capacity, "the host cache is beyond its capacity"
        assert all(one == entry.id for one, entry in self._entries.items()), "an entry has the id of another"

    def _drop(self, entry: EntryId) -> Entry | None:
        dropped = self._entries.pop(entry, None)
        if dropped is not None:
            self.bytes -= dropped.content.nbytes
        return dropped
