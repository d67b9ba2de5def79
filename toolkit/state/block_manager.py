"""Page tables of all groups of a model's layers, moved together.

Layers that remember equally far back form a group with pages of its own: full attention keeps every token, a sliding
window the last ones, a recurrence the state after the last token. A sequence has a table in each group.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from toolkit.state.block_allocator import BlockAllocator, OutOfBlocks
from toolkit.state.block_table import NULL_BLOCK, BlockTable, longest_prefix

Need = tuple[int, ...]
"""Pages a group."""


@dataclass(frozen=True)
class Group:
    """How far back the layers of a group read (``reach``, 0: all) and which pages they keep; see ``BlockTable``."""

    reach: int = 0
    stride: int = 0

    def blocks_for(self, tokens: int, sequences: int, chunk: int, block_size: int) -> int:
        """Pages for ``sequences`` that hold ``tokens`` together while ``chunk`` tokens a step come in."""
        everything = -(-tokens // block_size) + sequences
        if not self.reach:
            return everything
        arriving = -(-chunk // block_size)
        if self.stride:  # the last state of each, as much again for forks and prefixes, and what a step leaves behind
            return min(everything, 3 * sequences + arriving // self.stride + 1)
        return min(everything, sequences * (-(-self.reach // block_size) + 2) + arriving)


class BlockManager:
    """The allocators of ``groups``; makes the tables of sequences."""

    def __init__(self, groups: Sequence[Group], pages: Sequence[int], block_size: int) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        self.allocators = [BlockAllocator(count, block_size) for count in pages]

    @property
    def most_tokens(self) -> int | None:
        """Tokens that one sequence can have alone; None for any number."""
        rooms = [a.num_blocks * a.block_size for a, group in zip(self.allocators, self.groups) if not group.reach]
        return min(rooms, default=None)

    @property
    def free(self) -> Need:
        """Pages that can be had now."""
        return tuple(allocator.num_free for allocator in self.allocators)

    def tables(self, version: Hashable | None) -> "BlockTables":
        """An empty sequence."""
        return BlockTables(
            [
                BlockTable(a, version, group.reach, group.stride)
                for a, group in zip(self.allocators, self.groups, strict=True)
            ]
        )

    def drop_old_versions(self, version: Hashable) -> None:
        for allocator in self.allocators:
            allocator.drop_old_versions(version)

    def drop_cached(self) -> None:
        for allocator in self.allocators:
            allocator.drop_cached()

    def check_integrity(self, live: Iterable["BlockTables"]) -> None:
        """Raise AssertionError on any leak or inconsistency, given every sequence that holds pages."""
        sequences = list(live)
        for at, allocator in enumerate(self.allocators):
            allocator.check_integrity([tables.parts[at].held for tables in sequences])
        for tables in sequences:
            assert len({part.length for part in tables.parts}) == 1, "a sequence has different lengths in its groups"


class BlockTables:
    """One sequence's table in each group: see ``BlockTable``, whose steps these are."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[BlockTable]) -> None:
        self.parts = parts

    @property
    def length(self) -> int:
        """Tokens written."""
        return self.parts[0].length

    def match_prefix(self, tokens: Sequence[int]) -> int:
        """Share the longest cached prefix that every group can go on from; returns how many tokens that covers.

        Whole pages of the same weight version only, and never the whole prompt: its last token must run, since what is
        wanted is that token's output.
        """
        known = [part.prefixes(tokens[: len(tokens) - 1]) for part in self.parts]
        pages = longest_prefix(self.parts, known)
        for part, nodes in zip(self.parts, known, strict=True):
            part.adopt(nodes[:pages])
        return self.length

    def blocks_needed(self, n: int, at_once: int | None = None) -> Need:
        """Pages that ``n`` more tokens take from each group, ``at_once`` at a time, between which old ones go."""
        pieces = n if at_once is None else min(n, at_once)
        return tuple(part.blocks_needed(pieces if part.reach else n) for part in self.parts)

    def reserve(self, n: int) -> list[list[int]]:
        """Slots of the next ``n`` tokens in each group. Raises OutOfBlocks with every table unchanged."""
        if len(self.parts) > 1:
            for part in self.parts:
                needed = part.blocks_needed(n)
                if needed > part.allocator.num_free:
                    raise OutOfBlocks(f"{needed} pages were asked for and {part.allocator.num_free} are available.")
        return [part.reserve(n) for part in self.parts]

    def take_copies(self) -> list[list[tuple[int, int]]]:
        """Pending page copies of each group."""
        return [part.take_copies() for part in self.parts]

    def commit(self, tokens: Sequence[int], version: Hashable | None = None) -> None:
        for part in self.parts:
            part.commit(tokens, version)

    def fork(self) -> "BlockTables":
        return BlockTables([part.fork() for part in self.parts])

    def truncate(self, length: int) -> int:
        """Cut to the largest length up to ``length`` that every group can go on from, and return it."""
        while (kept := min(part.restorable(length) for part in self.parts)) != length:
            length = kept
        for part in self.parts:
            part.truncate(length)
        return length

    def release(self) -> None:
        for part in self.parts:
            part.release()

    def held_blocks(self) -> list[list[int]]:
        """Pages in order that hold the tokens so far, a list a group."""
        size = self.parts[0].allocator.block_size
        count = -(-self.length // size)
        return [[page for page in part.pages[:count] if page != NULL_BLOCK] for part in self.parts]

    def give_up(self) -> "Swapped":
        """Release every page, keeping where they belong: what ``Swapped.restore`` needs beside their contents."""
        size = self.parts[0].allocator.block_size
        count = -(-self.length // size)
        kept = [[at for at, page in enumerate(part.pages[:count]) if page != NULL_BLOCK] for part in self.parts]
        swapped = Swapped(list(self.parts[0].tokens), kept)
        self.release()
        return swapped


@dataclass(frozen=True)
class Swapped:
    """The shape of a sequence whose pages were given up: its tokens, and which pages of each group it held."""

    tokens: list[int]
    kept: list[list[int]]

    def blocks_needed(self, memory: "BlockManager | None" = None, more: int = 0, at_once: int | None = None) -> Need:
        """Pages to restore it; with ``memory``, at most as many as it takes to go on for ``more`` tokens too."""
        needed = [len(places) for places in self.kept]
        if memory is not None:
            pieces = more if at_once is None else min(more, at_once)
            for at, group in enumerate(memory.groups):
                needed[at] += 1 + -(-(pieces if group.reach else more) // memory.block_size)
        return tuple(needed)

    def restore(self, memory: BlockManager) -> BlockTables:
        """The sequence again, on new pages (contents are the caller's), which no prefix will be found in.

        Raises OutOfBlocks, changing nothing.
        """
        for needed, free in zip(self.blocks_needed(), memory.free, strict=True):
            if needed > free:
                raise OutOfBlocks(f"{needed} pages were asked for and {free} are available.")
        tables = memory.tables(None)
        for part, places in zip(tables.parts, self.kept, strict=True):
            part.pages = [NULL_BLOCK] * (-(-len(self.tokens) // memory.block_size))
            for at, page in zip(places, part.allocator.allocate(len(places)), strict=True):
                part.pages[at] = page
            part.tokens = list(self.tokens)
        return tables
