"""Block tables of all groups of a model's layers, moved together.

Layers that remember equally far back form a group with its own blocks: full attention keeps every token, a sliding
window the last ones, a recurrence the state after the last token. A sequence has a table in each group.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from toolkit.state.block_allocator import BlockAllocator, OutOfBlocks
from toolkit.state.block_table import NULL_BLOCK, BlockTable, longest_prefix
from toolkit.state.prefix import PrefixNode
from toolkit.state.prefix_key import PrefixKey, WeightKeys

BlockCounts = tuple[int, ...]
"""Blocks of each group."""


@dataclass(frozen=True)
class Group:
    """How far back the layers of a group read, and which blocks they keep; see ``BlockTable``.

    Args:
        lookback: last tokens that a sequence still reads; 0 for all.
        snapshot_interval: 0 where every token has a slot; s > 0 where every s-th block's state is kept.
    """

    lookback: int = 0
    snapshot_interval: int = 0

    def blocks_for(self, tokens: int, sequences: int, chunk: int, block_size: int, drafted: int = 0) -> int:
        """Blocks for ``sequences`` that hold ``tokens`` together while ``chunk`` tokens per step come in.

        Args:
            drafted: tokens of each that are drafted in a step.
        """
        everything = -(-tokens // block_size) + sequences
        if not self.lookback:
            return everything
        arriving = -(-chunk // block_size)
        if self.snapshot_interval:
            # The last state of each, as much again for forks and prefixes, and what a step leaves behind.
            drafts = (1 + drafted) * sequences if drafted else 0
            return min(everything, 3 * sequences + arriving // self.snapshot_interval + 1) + drafts
        return min(everything, sequences * (-(-self.lookback // block_size) + 2) + arriving)


class BlockManager:
    """The allocators of ``groups``, which have ``num_blocks`` each; makes the block tables of sequences."""

    def __init__(self, groups: Sequence[Group], num_blocks: Sequence[int], block_size: int) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        self.allocators = [BlockAllocator(count, block_size) for count in num_blocks]

    @property
    def max_sequence_tokens(self) -> int | None:
        """Tokens that one sequence can have alone; None for any number."""
        rooms = [a.num_blocks * a.block_size for a, group in zip(self.allocators, self.groups) if not group.lookback]
        return min(rooms, default=None)

    @property
    def num_free_blocks(self) -> BlockCounts:
        """Blocks of each group that are free or evictable."""
        return tuple(allocator.num_free_blocks for allocator in self.allocators)

    def new_block_tables(self, key: PrefixKey | None) -> "BlockTables":
        """Block tables of an empty sequence; without a key it shares no prefix."""
        return BlockTables(
            [
                BlockTable(a, key, group.lookback, group.snapshot_interval)
                for a, group in zip(self.allocators, self.groups, strict=True)
            ]
        )

    def drop_outdated(self, current: PrefixKey | WeightKeys) -> None:
        for allocator in self.allocators:
            allocator.drop_outdated(current)

    def reset_prefix_cache(self) -> None:
        for allocator in self.allocators:
            allocator.reset_prefix_cache()

    def check_integrity(self, live: Iterable["BlockTables"]) -> None:
        """Raise AssertionError on any leak or inconsistency, given every sequence that holds blocks."""
        sequences = list(live)
        for at, allocator in enumerate(self.allocators):
            allocator.check_integrity([block_tables.parts[at].held for block_tables in sequences])
        for block_tables in sequences:
            assert len({part.length for part in block_tables.parts}) == 1, (
                "a sequence has different lengths in its groups"
            )


class BlockTables:
    """One sequence's table in each group: see ``BlockTable``, whose steps these are."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[BlockTable]) -> None:
        self.parts = parts

    @property
    def length(self) -> int:
        """Tokens written."""
        return self.parts[0].length

    def match_prefix(self, tokens: Sequence[int], may_continue: Callable[[int], bool] | None = None) -> int:
        """The tokens of the longest cached prefix that every group can continue; the sequence now shares it.

        Whole blocks of the same key only, and never the whole prompt: its last token must run, since what is
        wanted is that token's output.

        Args:
            tokens: of the sequence.
            may_continue: whether it can continue after so many tokens; None for any number.
        """
        known = [part.known_prefix(tokens[: len(tokens) - 1]) for part in self.parts]
        num_blocks = longest_prefix(self.parts, known, may_continue)
        for part, nodes in zip(self.parts, known, strict=True):
            part.share_prefix(nodes[:num_blocks])
        snapshots = [part for part in self.parts if part.snapshot_interval]
        if snapshots:
            self._plan_snapshots(snapshots, known, len(tokens))
        return self.length

    def _plan_snapshots(self, parts: list[BlockTable], known: list[list[PrefixNode]], count: int) -> None:
        """Keep the state where a later sequence can continue: at the end of the prompt, and where it leaves another's.

        Where it does, the same prefix was seen twice, so a third one is likely.
        """
        size = self.parts[0].allocator.block_size
        others = [at for at, part in enumerate(self.parts) if not part.snapshot_interval]
        if others:  # as far as those that keep every token can continue
            branch = longest_prefix([self.parts[at] for at in others], [known[at] for at in others])
        else:
            branch = min(map(len, known))
        lengths = [length for length in (branch * size, (count - 1) // size * size) if length > self.length]
        for part in parts:
            part.keep_snapshots(lengths)

    def blocks_needed(self, n: int, at_once: int | None = None) -> BlockCounts:
        """Blocks that ``n`` more tokens take from each group, in chunks of ``at_once`` between which old ones go."""
        chunk = n if at_once is None else min(n, at_once)
        return tuple(part.blocks_needed(chunk if part.lookback else n) for part in self.parts)

    def reserve(self, n: int, drafts: bool = False) -> list[list[int]]:
        """Slots of the next ``n`` tokens in each group; ``drafts``: of which some may not stay.

        Raises OutOfBlocks with every table unchanged.
        """
        if len(self.parts) > 1:
            for part in self.parts:
                needed = part.blocks_needed(n, drafts)
                if needed > part.allocator.num_free_blocks:
                    raise OutOfBlocks(
                        f"{needed} blocks were requested, {part.allocator.num_free_blocks} are available."
                    )
        return [part.reserve(n, drafts) for part in self.parts]

    def take_copies(self) -> list[list[tuple[int, int]]]:
        """Pending block copies of each group."""
        return [part.take_copies() for part in self.parts]

    def commit(self, tokens: Sequence[int], key: PrefixKey | None = None) -> None:
        for part in self.parts:
            part.commit(tokens, key)

    def fork(self) -> "BlockTables":
        return BlockTables([part.fork() for part in self.parts])

    def truncate(self, length: int) -> int:
        """The largest length up to ``length`` that every group can continue; the sequence is truncated to it."""
        while (kept := min(part.restorable(length) for part in self.parts)) != length:
            length = kept
        for part in self.parts:
            part.truncate(length)
        return length

    def release(self) -> None:
        for part in self.parts:
            part.release()

    def held_blocks(self) -> list[list[int]]:
        """Blocks in order that hold the tokens so far, one list per group."""
        size = self.parts[0].allocator.block_size
        count = -(-self.length // size)
        return [[block for block in part.blocks[:count] if block != NULL_BLOCK] for part in self.parts]

    def swap_out(self) -> "Swapped":
        """Release every block; returns where they belong, which ``Swapped.restore`` needs beside their contents."""
        size = self.parts[0].allocator.block_size
        count = -(-self.length // size)
        indices = [[at for at, block in enumerate(part.blocks[:count]) if block != NULL_BLOCK] for part in self.parts]
        swapped = Swapped(list(self.parts[0].tokens), indices)
        self.release()
        return swapped


@dataclass(frozen=True)
class Swapped:
    """The shape of a sequence that was swapped out: its tokens, and which blocks of each group's table it held."""

    tokens: list[int]
    indices: list[list[int]]

    def blocks_needed(
        self, block_manager: "BlockManager | None" = None, more: int = 0, at_once: int | None = None
    ) -> BlockCounts:
        """Blocks to restore it; with ``block_manager``, at most as many as ``more`` further tokens take too."""
        needed = [len(indices) for indices in self.indices]
        if block_manager is not None:
            chunk = more if at_once is None else min(more, at_once)
            for at, group in enumerate(block_manager.groups):
                needed[at] += 1 + -(-(chunk if group.lookback else more) // block_manager.block_size)
        return tuple(needed)

    def restore(self, block_manager: BlockManager) -> BlockTables:
        """The sequence again, on new blocks (contents are the caller's), which no prefix will be found in.

        Raises OutOfBlocks, changing nothing.
        """
        for needed, free in zip(self.blocks_needed(), block_manager.num_free_blocks, strict=True):
            if needed > free:
                raise OutOfBlocks(f"{needed} blocks were requested, {free} are available.")
        block_tables = block_manager.new_block_tables(None)
        for part, indices in zip(block_tables.parts, self.indices, strict=True):
            part.blocks = [NULL_BLOCK] * (-(-len(self.tokens) // block_manager.block_size))
            for at, block in zip(indices, part.allocator.allocate(len(indices)), strict=True):
                part.blocks[at] = block
            part.tokens = list(self.tokens)
        return block_tables
