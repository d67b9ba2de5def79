"""The block table of a sequence: its blocks in order, shared with the sequences that have the same prefix."""

from collections.abc import Callable, Iterable, Sequence

from toolkit.state.block_allocator import BlockAllocator
from toolkit.state.prefix import PrefixNode
from toolkit.state.prefix_key import PrefixKey

NULL_BLOCK = -1
"""Stands in a table for a block that the sequence no longer reads, or never kept."""

_SPARE = 4  # 1 / this of a group's blocks stays free of snapshots that nobody has to have


class BlockTable:
    """One sequence's block table in one group of layers.

    A step is ``reserve(n)`` (slots for the next n tokens), then the block copies of ``take_copies()``, then
    the forward that fills the slots, then ``commit(tokens)``, which alone moves ``length``. A step that
    fails before its commit leaves nothing to undo: the next ``reserve`` returns the same slots.

    Tokens that may turn out wrong are reserved as drafts: ``commit`` may then take fewer of them. Slots of rejected
    ones are written again. Snapshots cannot be, so the state after each drafted token has a separate block until
    ``commit`` picks those that stay.

    Args:
        allocator: of the group.
        key: under which its prefix is shared; None keeps it out of the prefix index.
        lookback: how many of its last tokens the sequence still reads, 0 for all. Blocks before them are freed (and
            can be matched until they are evicted).
        snapshot_interval: 0 where every token has a slot; s > 0 where a block holds one value, the state after its last
            token. Every s-th block and the last one are kept, and those that ``keep_snapshots`` names while there is
            room.

    Attributes:
        blocks: physical blocks in order, reserved ones included; ``NULL_BLOCK`` for those that are not held.
        tokens: those whose state is written.
    """

    def __init__(
        self, allocator: BlockAllocator, key: PrefixKey | None, lookback: int = 0, snapshot_interval: int = 0
    ) -> None:
        self.allocator = allocator
        self.key = key
        self.lookback = lookback
        self.snapshot_interval = snapshot_interval
        self.blocks: list[int] = []
        self.tokens: list[int] = []
        self._copies: list[tuple[int, int]] = []
        self._drafted: list[int] = []  # of snapshots: the block of the state after each token of a drafted step
        self._wanted_snapshots: frozenset[int] = frozenset()
        # The prefix up to the last full block; None where there is none yet, and while key is None.
        self._node: PrefixNode | None = None

    @property
    def length(self) -> int:
        """Tokens written."""
        return len(self.tokens)

    @property
    def held(self) -> list[int]:
        """Every block that this table counts for: its own, sources of copies not yet taken, and a drafted step's."""
        own = [block for block in self.blocks if block != NULL_BLOCK]
        return own + [source for source, _ in self._copies] + self._drafted

    def first_read(self, length: int) -> int:
        """Index of the first block that a sequence of ``length`` tokens still reads."""
        return max(0, length - self.lookback) // self.allocator.block_size if self.lookback else 0

    def known_prefix(self, tokens: Sequence[int]) -> list[PrefixNode]:
        """Nodes of the full blocks of ``tokens`` that the prefix index knows, under this table's key."""
        return [] if self.key is None else self.allocator.path(tokens, self.key)

    def can_continue(self, nodes: Sequence[PrefixNode], num_blocks: int) -> bool:
        """Whether the first ``num_blocks`` of ``nodes`` have all the blocks that a sequence continuing there reads."""
        first = self.first_read(num_blocks * self.allocator.block_size)
        return all(node.block is not None for node in nodes[first:num_blocks])

    def share_prefix(self, nodes: Sequence[PrefixNode]) -> None:
        """Start from the prefix of ``nodes``, sharing its blocks. Raises RuntimeError unless the table is empty."""
        if self.blocks:
            raise RuntimeError(f"a table must be empty to share a prefix, got {len(self.blocks)} blocks.")
        if nodes:
            first = self.first_read(len(nodes) * self.allocator.block_size)
            taken = [node.block for node in nodes[first:] if node.block is not None]
            self.allocator.touch(taken)
            self.blocks = [NULL_BLOCK] * first + taken
            self.tokens = [token for node in nodes for token in node.tokens]
            self._node = nodes[-1]

    def keep_snapshots(self, lengths: Iterable[int]) -> None:
        """Keep the state after so many tokens too, whole blocks of them, where others may continue."""
        self._wanted_snapshots = frozenset(length // self.allocator.block_size - 1 for length in lengths if length > 0)

    def _optional(self, n: int, needed: int) -> list[int]:
        """Indices of the snapshots that are kept of the next ``n`` tokens although nobody has to have them."""
        size = self.allocator.block_size
        ends = range(self.length // size, (self.length + n) // size)
        wanted = [at for at in self._wanted_snapshots if at in ends and not self._holds(at)]
        room = self.allocator.num_free_blocks - needed - self.allocator.num_blocks // _SPARE
        return wanted if room >= len(wanted) else []

    def blocks_needed(self, n: int, drafts: bool = False) -> int:
        """Blocks that ``reserve(n, drafts)`` would take from the allocator."""
        if drafts and self.snapshot_interval:
            return n - len(self._drafted)
        return len(self._missing(n)) + (n > 0 and self._last_block_is_shared())

    def _missing(self, n: int) -> list[int]:
        """Indices of the blocks that the next ``n`` tokens need and that are not there."""
        size = self.allocator.block_size
        first, end = -(-self.length // size), -(-(self.length + n) // size)
        if not self.snapshot_interval:
            return list(range(max(first, len(self.blocks)), end))
        return [at for at in range(first, end) if self._is_kept(at, end) and not self._holds(at)]

    def _is_kept(self, at: int, end: int) -> bool:
        """Of snapshots: whether the block is one that has to be kept of a sequence of ``end`` blocks."""
        return at == end - 1 or (at + 1) % self.snapshot_interval == 0

    def _holds(self, at: int) -> bool:
        return at < len(self.blocks) and self.blocks[at] != NULL_BLOCK

    def reserve(self, n: int, drafts: bool = False) -> list[int]:
        """Slots (block * block_size + offset) for the next ``n`` tokens; ``drafts``: of which some may not stay.

        Takes new blocks as needed. A block that is partly filled and shared is replaced by a new one, and the
        copy is left for ``take_copies``. Raises OutOfBlocks with the table unchanged.
        Of snapshots the slots mean nothing: ask ``store_blocks``.
        """
        if drafts and self.snapshot_interval:
            self._drafted += self.allocator.allocate(max(0, n - len(self._drafted)))
            return []
        self._drop_drafted()
        if n <= 0:
            return []
        size = self.allocator.block_size
        tail = self.length // size
        copy = self._last_block_is_shared()
        missing = self._missing(n)
        if self._wanted_snapshots:
            missing = sorted({*missing, *self._optional(n, len(missing) + copy)})
        fresh = self.allocator.allocate(len(missing) + copy)
        if copy:
            # The source stays held until the copy is taken, so that it cannot be allocated again before.
            self._copies.append((self.blocks[tail], fresh[0]))
            self.blocks[tail] = fresh.pop(0)
        elif self.length % size:
            self.allocator.make_writable(self.blocks[tail])
        if missing:
            self.blocks += [NULL_BLOCK] * (missing[-1] + 1 - len(self.blocks))
            for at, block in zip(missing, fresh, strict=True):
                self.blocks[at] = block
        if self.snapshot_interval:
            return []
        return [self.blocks[at // size] * size + at % size for at in range(self.length, self.length + n)]

    def load_block(self) -> int:
        """Of snapshots: the block that holds the state after the last token; ``NULL_BLOCK`` if there is none."""
        return self.blocks[(self.length - 1) // self.allocator.block_size] if self.length else NULL_BLOCK

    def store_blocks(self, n: int) -> list[tuple[int, int]]:
        """Of snapshots: (which of the next ``n`` tokens, block that the state after it goes to), once reserved."""
        if self._drafted:
            return list(enumerate(self._drafted[:n]))
        size, length = self.allocator.block_size, self.length
        found = []
        for at in range(length // size, -(-(length + n) // size)) if n > 0 else ():
            if self.blocks[at] != NULL_BLOCK:
                found.append((min((at + 1) * size, length + n) - length - 1, self.blocks[at]))
        return found

    def take_copies(self) -> list[tuple[int, int]]:
        """Pending (source, destination) block copies, to be run in order before the slots are filled."""
        copies, self._copies = self._copies, []
        self.allocator.free([source for source, _ in copies])
        return copies

    def commit(self, tokens: Sequence[int], key: PrefixKey | None = None) -> None:
        """The next reserved slots now hold the state of ``tokens``; full blocks can be matched.

        Blocks that the sequence does not read any more are freed.

        Args:
            tokens: the next tokens of the sequence.
            key: under which they were computed, where known. Once it differs from the table's, the sequence has mixed
                weight versions and none of its later blocks is ever registered.

        Raises:
            RuntimeError: for more tokens than were reserved.
        """
        size = self.allocator.block_size
        if self._drafted:
            self._keep_drafted(len(tokens))
        if self.length + len(tokens) > len(self.blocks) * size:
            room = len(self.blocks) * size - self.length
            raise RuntimeError(f"committed tokens must be <= the {room} reserved slots, got {len(tokens)}.")
        if key is not None and key != self.key:
            self.key = self._node = None
        before = self.length
        self.tokens += tokens
        if self.key is not None:
            for at in range(before // size, self.length // size):
                page_tokens = self.tokens[at * size : (at + 1) * size]
                block = None if self.blocks[at] == NULL_BLOCK else self.blocks[at]
                self._node = self.allocator.register(block, self._node, page_tokens, self.key)
        if self.lookback:
            first = self.first_read(before)
            out_of_window = [
                block for block in self.blocks[first : self.first_read(self.length)] if block != NULL_BLOCK
            ]
            if out_of_window:
                self.allocator.free(out_of_window)
            for at in range(first, self.first_read(self.length)):
                self.blocks[at] = NULL_BLOCK

    def _keep_drafted(self, n: int) -> None:
        """Put the states after ``n`` drafted tokens where an ordinary step would have put them; free the others."""
        size, end = self.allocator.block_size, -(-(self.length + n) // self.allocator.block_size)
        self.blocks += [NULL_BLOCK] * (end - len(self.blocks))
        for at in range(self.length // size, end):
            if self._is_kept(at, end) or self._holds(at) or at in self._wanted_snapshots:
                row = min((at + 1) * size, self.length + n) - self.length - 1
                self.blocks[at], self._drafted[row] = self._drafted[row], self.blocks[at]
        self._drop_drafted()

    def _drop_drafted(self) -> None:
        dropped, self._drafted = self._drafted, []
        self.allocator.free([block for block in dropped if block != NULL_BLOCK])

    def fork(self) -> "BlockTable":
        """A second sequence with the same past. Blocks are shared; whoever writes into a shared one copies it.

        Raises RuntimeError while copies are pending, since the shared block would not hold its contents yet.
        """
        if self._copies:
            raise RuntimeError("take_copies() must be called before fork().")
        other = BlockTable(self.allocator, self.key, self.lookback, self.snapshot_interval)
        other.blocks = self.blocks[: -(-self.length // self.allocator.block_size)]
        self.allocator.touch([block for block in other.blocks if block != NULL_BLOCK])
        other.tokens = self.tokens.copy()
        other._node = self._node
        return other

    def restorable(self, length: int) -> int:
        """The largest length up to ``length`` that the sequence can be truncated to and continue."""
        size = self.allocator.block_size
        if length >= self.length or not self.lookback:
            return min(length, self.length)
        if self.snapshot_interval:
            length = length // size * size
        while length > 0 and NULL_BLOCK in self.blocks[self.first_read(length) : -(-length // size)]:
            length = (length - 1) // size * size
        return length

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on, with the blocks that only they needed, reserved ones included.

        Raises ValueError outside 0..length and for a length that is not ``restorable``.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and {self.length}, got {length}.")
        if self.restorable(length) != length:
            raise ValueError(
                f"length must be one whose state is kept, such as {self.restorable(length)}, got {length}."
            )
        self._drop_drafted()
        size = self.allocator.block_size
        if self._node is not None:
            for _ in range(self.length // size - length // size):
                assert self._node is not None
                self._node = self._node.parent
        keep = -(-length // size)
        dropped, self.blocks = self.blocks[keep:], self.blocks[:keep]
        stale = [copy for copy in self._copies if copy[1] in dropped]
        self._copies = [copy for copy in self._copies if copy[1] not in dropped]
        self.allocator.free([source for source, _ in stale])
        self.allocator.free([block for block in dropped if block != NULL_BLOCK])
        del self.tokens[length:]

    def release(self) -> None:
        """Free every block and be empty again; registered blocks can be matched until evicted.

        Pending copies are dropped.
        """
        self.truncate(0)

    def _last_block_is_shared(self) -> bool:
        """Whether the next token goes into a block that is partly filled and held by others too."""
        size = self.allocator.block_size
        return self.length % size != 0 and self.allocator.ref_count(self.blocks[self.length // size]) > 1


def longest_prefix(
    tables: Sequence[BlockTable],
    nodes: Sequence[Sequence[PrefixNode]],
    may_continue: Callable[[int], bool] | None = None,
) -> int:
    """Blocks of the longest prefix that every one of ``tables`` can continue; ``nodes``: what each knows of it.

    Args:
        may_continue: whether a sequence can continue after so many tokens; None for any number.
    """
    size = tables[0].allocator.block_size
    for num_blocks in range(min(len(known) for known in nodes), 0, -1):
        if may_continue is not None and not may_continue(num_blocks * size):
            continue
        if all(table.can_continue(known, num_blocks) for table, known in zip(tables, nodes, strict=True)):
            return num_blocks
    return 0
