"""Blocks as numbers: who holds them, which are free, which are kept because their prefix may come back.

A block is in exactly one of three conditions: held (reference count above zero), cached (nobody holds it but
the prefix index knows its tokens; evicted least recently used first), or free.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

from toolkit.state.prefix import PrefixIndex, PrefixNode
from toolkit.state.prefix_key import PrefixKey, WeightKeys


class OutOfBlocks(Exception):
    """More blocks were requested than are free or evictable; nothing was changed."""


class BlockAllocator:
    """Reference counts, the free list and the prefix index of ``num_blocks`` blocks of ``block_size`` tokens.

    Attributes:
        on_evict: is called with evicted blocks and what they were registered under, before they are handed out.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 0 or block_size < 1:
            raise ValueError(f"num_blocks must be >= 0 and block_size >= 1, got {num_blocks} and {block_size}.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_index = PrefixIndex(block_size)
        self.on_evict: Callable[[list[tuple[int, PrefixNode]]], None] | None = None
        # Of the blocks that were ever handed out, which are the first ones.
        self._ref_counts: list[int] = []
        # A stack of those that came back: blocks used last are still in the caches of the machine.
        self._free: list[int] = []
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that ``allocate`` can hand out: free ones and evictable cached ones."""
        return len(self._free) + len(self._cached) + self.num_blocks - len(self._ref_counts)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody holds and whose prefix can still be matched."""
        return len(self._cached)

    def ref_count(self, block: int) -> int:
        """How many holders a block has."""
        return self._ref_counts[block] if block < len(self._ref_counts) else 0

    def allocate(self, n: int) -> list[int]:
        """``n`` blocks, each held once. Cached blocks are evicted only once no free block is left.

        Raises OutOfBlocks, changing nothing, when fewer than ``n`` are free or evictable.
        """
        if n > self.num_free_blocks:
            raise OutOfBlocks(f"{n} blocks were requested, {self.num_free_blocks} of {self.num_blocks} are available.")
        blocks, evicted = [], []
        for _ in range(n):
            if self._free:
                block = self._free.pop()
            elif len(self._ref_counts) < self.num_blocks:
                block = len(self._ref_counts)
                self._ref_counts.append(0)
            else:
                block, _ = self._cached.popitem(last=False)
                evicted.append((block, self.prefix_index.drop(block)))
            self._ref_counts[block] = 1
            blocks.append(block)
        if evicted and self.on_evict is not None:
            self.on_evict(evicted)
        return blocks

    def touch(self, blocks: Sequence[int]) -> None:
        """One more holder for each block, held or cached.

        Raises ValueError, changing nothing, for a free one.
        """
        for block in blocks:
            if self.ref_count(block) == 0 and block not in self._cached:
                raise ValueError(f"blocks must be held or cached to be shared, got the free block {block}.")
        for block in blocks:
            self._cached.pop(block, None)
            self._ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each block; the last holder's leaving caches a registered block, frees another.

        The last of ``blocks`` becomes the least recently used: a block is useless without those before it.
        Raises ValueError, changing nothing, when a block would be freed more often than it is held.
        """
        if not blocks:  # nearly always, in a decode step
            return
        for block, times in Counter(blocks).items():
            if self.ref_count(block) < times:
                raise ValueError(f"block {block} must be freed at most {self.ref_count(block)} times, got {times}.")
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self.prefix_index:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def path(self, tokens: Sequence[int], key: PrefixKey) -> list[PrefixNode]:
        """Known full blocks from the first token on, some perhaps without a block now; shares nothing."""
        return self.prefix_index.path(tokens, key)

    def register(
        self, block: int | None, parent: PrefixNode | None, block_tokens: Sequence[int], key: PrefixKey
    ) -> PrefixNode:
        """Enter a held, full block into the prefix index; see ``PrefixIndex.register``."""
        if block is not None and self.ref_count(block) == 0:
            raise ValueError(f"blocks must be held to be registered, got the free block {block}.")
        return self.prefix_index.register(block, parent, block_tokens, key)

    def make_writable(self, block: int) -> bool:
        """Whether the one holder of ``block`` may write into it; False if it needs a copy first.

        A registered block with a single holder leaves the prefix index, because its tokens are about to
        change.
        """
        if self.ref_count(block) != 1:
            return False
        if block in self.prefix_index:
            self.prefix_index.drop(block)
        return True

    def drop_outdated(self, current: PrefixKey | WeightKeys) -> None:
        """Forget every prefix whose key ``current`` outdates; cached ones become free."""
        for block in self.prefix_index.drop_outdated(current):
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def reset_prefix_cache(self) -> None:
        """Forget every prefix whose blocks nobody holds; they become free."""
        while self._cached:
            block, _ = self._cached.popitem()
            self.prefix_index.drop(block)
            self._free.append(block)

    def check_integrity(self, live: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError on any leak, double free or inconsistency.

        live: the blocks that each holder holds (``BlockTable.held``), all of them; then every reference count must
        equal the number of times that the block is held.
        """
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert not free & cached, "a block is both free and cached"
        for block, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block} has reference count {count}"
            assert (count == 0) == (block in free or block in cached), f"block {block} is lost or free while held"
            assert block not in free or block not in self.prefix_index, f"block {block} is free and registered"
            assert block not in cached or block in self.prefix_index, f"block {block} is cached and not registered"
        assert free | cached <= set(range(len(self._ref_counts))), "a block that does not exist is free or cached"
        self.prefix_index.check_integrity()
        if live is not None:
            held = Counter(block for blocks in live for block in blocks)
            for block in {*range(len(self._ref_counts)), *held}:
                count = self.ref_count(block)
                assert count == held[block], f"block {block} is counted {count} times and held {held[block]} times"
