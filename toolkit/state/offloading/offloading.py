"""Cached prefixes beyond the pool: blocks that it evicts go to host memory, from there to disk, and come back."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from toolkit.state.block_manager import BlockManager, BlockTables
from toolkit.state.offloading.disk import DiskCache
from toolkit.state.offloading.entries import Entry, EntryId, node_digest, prefix_digests
from toolkit.state.offloading.host import HostCache
from toolkit.state.pool import StatePool
from toolkit.state.prefix import PrefixNode
from toolkit.state.prefix_key import PrefixKey, WeightKeys


class PrefixOffloading:
    """Keeps what the allocators of ``block_manager`` evict, and gives it back to the pool.

    A block's bytes are what was evicted, so a sequence that continues behind them computes what it would have computed
    behind the evicted block itself.

    Args:
        pool: of the contents.
        block_manager: of the blocks.
        host_bytes: room in host memory; None for no bound.
        disk_bytes: room on disk; None for no bound, 0 for none.
        folder: of what is on disk.

    Attributes:
        restored_tokens: of prompts, whose offloaded state came back.

    Raises:
        OSError: for a folder that cannot be written.
    """

    def __init__(
        self,
        pool: StatePool,
        block_manager: BlockManager,
        host_bytes: int | None,
        disk_bytes: int | None = 0,
        folder: Path | None = None,
    ) -> None:
        self.pool = pool
        self.block_manager = block_manager
        self.host = HostCache(host_bytes)
        self.sizes = pool.group_bytes
        self.disk: DiskCache | None = None
        if disk_bytes != 0:
            assert folder is not None
            self.disk = DiskCache(disk_bytes, folder, self.sizes)
        self.restored_tokens = 0
        for group, allocator in enumerate(block_manager.allocators):
            allocator.on_evict = self._keeper(group)

    def restore(
        self, tables: BlockTables, tokens: Sequence[int], may_continue: Callable[[int], bool] | None = None
    ) -> int:
        """Bring back the longest prefix of ``tokens`` that is cached or offloaded, as cached blocks.

        Args:
            tables: of the sequence, which hold what the pool has.
            tokens: of the sequence.
            may_continue: whether it can continue after so many tokens; None for any number.

        Returns:
            By how many tokens ``BlockTables.match_prefix`` will find more now.
        """
        key = tables.parts[0].key
        if key is None or not (len(self.host) or self.disk):
            return 0
        size = self.block_manager.block_size
        digests = prefix_digests(tokens[: len(tokens) - 1], size, key)
        while True:
            plan = _Plan(self, tables, tokens, digests, key)
            length = plan.longest(tables.length // size, may_continue)
            if not length:
                return 0
            contents = [
                self._contents([(group, digests[at]) for at in missing], key) for group, missing in plan.missing()
            ]
            if None not in contents:  # else a file was damaged: what is left may have a shorter one
                break
        if not plan.fill(contents):
            return 0
        restored = length * size - tables.length
        self.restored_tokens += restored
        return restored

    def has(self, entry: EntryId, key: PrefixKey) -> bool:
        """Whether the block is offloaded, computed under ``key``."""
        return self.host.has(entry, key) or (self.disk is not None and self.disk.has(entry, key))

    def put(self, entry: Entry) -> None:
        """Keep a block."""
        for out in self.host.put(entry):
            if self.disk is not None:
                self.disk.put(out)

    def entries(self) -> Iterator[Entry]:
        """What is offloaded, each block once, less recently used ones first."""
        kept = list(self.host.entries())
        in_host = {one.id for one in kept}
        if self.disk is not None:
            yield from (one for one in self.disk.entries() if one.id not in in_host)
        yield from kept

    def drop_outdated(self, current: PrefixKey | WeightKeys) -> None:
        """Forget what ``current`` outdates."""
        self.host.drop_outdated(current)
        if self.disk is not None:
            self.disk.drop_outdated(current)

    def stats(self) -> dict[str, float]:
        """What is offloaded, and totals of blocks and tokens."""
        caches = {"host": self.host, "disk": self.disk}
        found: dict[str, float] = {"kv_restored_tokens": self.restored_tokens}
        for name, cache in caches.items():
            if cache is not None:
                found[f"kv_{name}_blocks"] = len(cache)
                found[f"kv_{name}_bytes"] = cache.bytes
                found[f"kv_{name}_hits"] = cache.hits
                found[f"kv_{name}_evictions"] = cache.evictions
        if self.disk is not None:
            found["kv_disk_failures"] = self.disk.failures
        return found

    def check_integrity(self) -> None:
        """Raise AssertionError where host or disk does not add up."""
        self.host.check_integrity()
        if self.disk is not None:
            self.disk.check_integrity()

    def close(self) -> None:
        """Forget everything, remove what is on disk, and let go of the pool."""
        for allocator in self.block_manager.allocators:
            allocator.on_evict = None
        self.clear()
        if self.disk is not None:
            self.disk.close()
        del self.pool

    def clear(self) -> None:
        """Forget everything."""
        self.host.clear()
        if self.disk is not None:
            self.disk.clear()

    def _keeper(self, group: int) -> Callable[[list[tuple[int, PrefixNode]]], None]:
        """What an allocator calls before it hands out evicted blocks."""

        def keep(evicted: list[tuple[int, PrefixNode]]) -> None:
            fresh = []
            for block, node in evicted:
                entry = (group, node_digest(node))
                if self.host.has(entry, node.key):
                    self.host.touch(entry)
                else:
                    fresh.append((block, entry, node.key))
            if fresh:
                packed = self.pool.pack(group, [block for block, _, _ in fresh])
                for (_, entry, key), content in zip(fresh, packed, strict=True):
                    self.put(Entry(entry, key, content.clone()))  # separate memory, to be freed alone

        return keep

    def _contents(self, wanted: list[EntryId], key: PrefixKey) -> list[Tensor] | None:
        """Of offloaded blocks, the last one first in the order of use; None where a file is damaged."""
        found = []
        for one in reversed(wanted):
            if self.host.has(one, key):
                content: Tensor | None = self.host.get(one)
            else:
                content = self.disk.get(one) if self.disk is not None else None
            if content is None:
                return None
            found.append(content)
        return found[::-1]


class _Plan:
    """Which blocks of a prefix the pool has, which are offloaded, and which have to come."""

    def __init__(
        self,
        offloading: PrefixOffloading,
        tables: BlockTables,
        tokens: Sequence[int],
        digests: list[bytes],
        key: PrefixKey,
    ) -> None:
        self.offloading = offloading
        self.tables = tables
        self.tokens = tokens
        self.digests = digests
        self.key = key
        self.known = [part.known_prefix(tokens[: len(tokens) - 1]) for part in tables.parts]
        self.length = 0

    def longest(self, beyond: int, may_continue: Callable[[int], bool] | None) -> int:
        """Blocks of the longest prefix that every group can continue; 0 where it is none of more than ``beyond``."""
        parts, size = self.tables.parts, self.offloading.block_manager.block_size
        most = len(self.digests)
        for group, part in enumerate(parts):
            if not part.lookback:
                most = next((at for at in range(most) if not self._has(group, at)), most)
        for count in range(most, beyond, -1):
            if may_continue is not None and not may_continue(count * size):
                continue
            if all(
                self._has(group, at)
                for group, part in enumerate(parts)
                if part.lookback
                for at in range(part.first_read(count * size), count)
            ):
                self.length = count
                return count
        return 0

    def missing(self) -> list[tuple[int, list[int]]]:
        """Of each group, the indices of the blocks that are offloaded only."""
        return [
            (group, [at for at in self._read(group) if self._block(group, at) is None])
            for group in range(len(self.tables.parts))
        ]

    def fill(self, contents: Sequence[list[Tensor] | None]) -> bool:
        """Put the contents of ``missing`` into blocks and register those; False, changing nothing, without room."""
        allocators = self.offloading.block_manager.allocators
        missing = self.missing()
        held = [
            [block for at in self._read(group) if (block := self._block(group, at)) is not None]
            for group in range(len(allocators))
        ]
        for allocator, blocks in zip(allocators, held, strict=True):
            allocator.touch(blocks)  # so that nothing of the prefix makes room for the rest of it
        try:
            if any(len(missing[group][1]) > one.num_free_blocks for group, one in enumerate(allocators)):
                return False
            for (group, indices), found in zip(missing, contents, strict=True):
                blocks = allocators[group].allocate(len(indices))
                filled = dict(zip(indices, blocks, strict=True))
                held[group] = self._in_order(group, held[group], filled)
                if found:
                    self.offloading.pool.unpack(group, blocks, found)
                self._register(group, filled)
            return True
        finally:
            for allocator, blocks in zip(allocators, held, strict=True):
                allocator.free(blocks)

    def _in_order(self, group: int, held: list[int], filled: dict[int, int]) -> list[int]:
        rest = iter(held)
        return [filled[at] if at in filled else next(rest) for at in self._read(group)]

    def _register(self, group: int, filled: dict[int, int]) -> None:
        size, parent = self.offloading.block_manager.block_size, None
        for at in range(self.length):
            tokens = self.tokens[at * size : (at + 1) * size]
            allocator = self.offloading.block_manager.allocators[group]
            parent = allocator.register(filled.get(at), parent, tokens, self.key)

    def _read(self, group: int) -> range:
        size = self.offloading.block_manager.block_size
        return range(self.tables.parts[group].first_read(self.length * size), self.length)

    def _block(self, group: int, at: int) -> int | None:
        return self.known[group][at].block if at < len(self.known[group]) else None

    def _has(self, group: int, at: int) -> bool:
        return self._block(group, at) is not None or self.offloading.has((group, self.digests[at]), self.key)
