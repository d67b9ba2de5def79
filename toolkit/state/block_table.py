"""The forest of sequences: each one's pages in order, shared with the sequences that have the same prefix."""

from collections.abc import Hashable, Sequence

from toolkit.state.block_allocator import BlockAllocator
from toolkit.state.prefix import PrefixNode

NULL_BLOCK = -1
"""Stands in a table for a page that the sequence no longer reads, or never kept."""


class BlockTable:
    """One sequence's block table in one group of layers.

    A step is ``reserve(n)`` (slots for the next n tokens), then the page copies of ``take_copies()``, then
    the forward that fills the slots, then ``commit(tokens)``, which alone moves ``length``. A step that
    fails before its commit leaves nothing to undo: the next ``reserve`` returns the same slots.

    version: of the weights that compute the sequence; None keeps it out of the prefix index. reach: how many of its
    last tokens the sequence still reads, 0 for all: pages before them are given back (and stay matchable while nobody
    needs the memory). stride: 0 where every token has a slot; s > 0 where a page holds one value, the state after its
    last token, of which every s-th page and the last one are kept. pages: physical pages in order, reserved ones
    included; ``NULL_BLOCK`` for those that are not held. tokens: those whose state is written.
    """

    def __init__(self, allocator: BlockAllocator, version: Hashable | None, reach: int = 0, stride: int = 0) -> None:
        self.allocator = allocator
        self.version = version
        self.reach = reach
        self.stride = stride
        self.pages: list[int] = []
        self.tokens: list[int] = []
        self._copies: list[tuple[int, int]] = []
        # The prefix up to the last full page; None where there is none yet, and while version is None.
        self._node: PrefixNode | None = None

    @property
    def length(self) -> int:
        """Tokens written."""
        return len(self.tokens)

    @property
    def held(self) -> list[int]:
        """Every page that this table counts for: its own, and the sources of copies not yet taken."""
        return [page for page in self.pages if page != NULL_BLOCK] + [source for source, _ in self._copies]

    def first_read(self, length: int) -> int:
        """Index of the first page that a sequence of ``length`` tokens still reads."""
        return max(0, length - self.reach) // self.allocator.block_size if self.reach else 0

    def prefixes(self, tokens: Sequence[int]) -> list[PrefixNode]:
        """What is known of the full pages of ``tokens``, under this table's version."""
        return [] if self.version is None else self.allocator.path(tokens, self.version)

    def suffices(self, nodes: Sequence[PrefixNode], pages: int) -> bool:
        """Whether the first ``pages`` of ``nodes`` have all the pages that a sequence which goes on there reads."""
        first = self.first_read(pages * self.allocator.block_size)
        return all(node.page is not None for node in nodes[first:pages])

    def adopt(self, nodes: Sequence[PrefixNode]) -> None:
        """Start from the prefix of ``nodes``, sharing its pages. Raises RuntimeError unless the table is empty."""
        if self.pages:
            raise RuntimeError("a prefix needs an empty table.")
        if nodes:
            first = self.first_read(len(nodes) * self.allocator.block_size)
            taken = [node.page for node in nodes[first:] if node.page is not None]
            self.allocator.share(taken)
            self.pages = [NULL_BLOCK] * first + taken
            self.tokens = [token for node in nodes for token in node.tokens]
            self._node = nodes[-1]

    def blocks_needed(self, n: int) -> int:
        """Pages that ``reserve(n)`` would take from the allocator."""
        return len(self._missing(n)) + (n > 0 and self._last_page_is_shared())

    def _missing(self, n: int) -> list[int]:
        """Indices of the pages that the next ``n`` tokens need and that are not there."""
        size = self.allocator.block_size
        first, end = -(-self.length // size), -(-(self.length + n) // size)
        if not self.stride:
            return list(range(max(first, len(self.pages)), end))
        wanted = {at for at in range(first, end) if (at + 1) % self.stride == 0} | ({end - 1} if end > first else set())
        return sorted(at for at in wanted if at >= len(self.pages) or self.pages[at] == NULL_BLOCK)

    def reserve(self, n: int) -> list[int]:
        """Slots (page * block_size + place) for the next ``n`` tokens.

        Takes new pages as needed. A page that is partly filled and shared is replaced by a new one, and the
        copy is left for ``take_copies``. Raises OutOfBlocks with the table unchanged.
        With a stride the slots mean nothing: ask ``saves``.
        """
        if n <= 0:
            return []
        size = self.allocator.block_size
        tail = self.length // size
        copy = self._last_page_is_shared()
        missing = self._missing(n)
        fresh = self.allocator.allocate(len(missing) + copy)
        if copy:
            # The source stays held until the copy is taken, so that nobody else can be given it before.
            self._copies.append((self.pages[tail], fresh[0]))
            self.pages[tail] = fresh.pop(0)
        elif self.length % size:
            self.allocator.make_writable(self.pages[tail])
        if missing:
            self.pages += [NULL_BLOCK] * (missing[-1] + 1 - len(self.pages))
            for at, page in zip(missing, fresh, strict=True):
                self.pages[at] = page
        if self.stride:
            return []
        return [self.pages[at // size] * size + at % size for at in range(self.length, self.length + n)]

    def source(self) -> int:
        """With a stride: the page that holds the state after the last token; ``NULL_BLOCK`` if there is none."""
        return self.pages[(self.length - 1) // self.allocator.block_size] if self.length else NULL_BLOCK

    def saves(self, n: int) -> list[tuple[int, int]]:
        """With a stride: (which of the next ``n`` tokens, page that the state after it goes to), once reserved."""
        size, length = self.allocator.block_size, self.length
        found = []
        for at in range(length // size, -(-(length + n) // size)) if n > 0 else ():
            if self.pages[at] != NULL_BLOCK:
                found.append((min((at + 1) * size, length + n) - length - 1, self.pages[at]))
        return found

    def take_copies(self) -> list[tuple[int, int]]:
        """Pending (source, destination) page copies, to be run in order before the slots are filled."""
        copies, self._copies = self._copies, []
        self.allocator.free([source for source, _ in copies])
        return copies

    def commit(self, tokens: Sequence[int], version: Hashable | None = None) -> None:
        """Say that the next reserved slots now hold the state of ``tokens``; full pages become matchable.

        Pages that the sequence does not read any more are given back.
        version: of the weights that wrote them, where known. Once it differs from the table's, the sequence
        is of two minds and none of its later pages is ever registered.
        Raises RuntimeError for more tokens than were reserved.
        """
        size = self.allocator.block_size
        if self.length + len(tokens) > len(self.pages) * size:
            room = len(self.pages) * size - self.length
            raise RuntimeError(f"{len(tokens)} tokens were committed and {room} slots are reserved.")
        if version is not None and version != self.version:
            self.version = self._node = None
        before = self.length
        self.tokens += tokens
        if self.version is not None:
            for at in range(before // size, self.length // size):
                page_tokens = self.tokens[at * size : (at + 1) * size]
                page = None if self.pages[at] == NULL_BLOCK else self.pages[at]
                self._node = self.allocator.register(page, self._node, page_tokens, self.version)
        if self.reach:
            first = self.first_read(before)
            out_of_reach = [page for page in self.pages[first : self.first_read(self.length)] if page != NULL_BLOCK]
            if out_of_reach:
                self.allocator.free(out_of_reach)
            for at in range(first, self.first_read(self.length)):
                self.pages[at] = NULL_BLOCK

    def fork(self) -> "BlockTable":
        """A second sequence with the same past. Pages are shared; whoever writes into a shared one copies it.

        Raises RuntimeError while copies are pending, since the shared page would not hold its contents yet.
        """
        if self._copies:
            raise RuntimeError("take_copies must be called before fork.")
        other = BlockTable(self.allocator, self.version, self.reach, self.stride)
        other.pages = self.pages[: -(-self.length // self.allocator.block_size)]
        self.allocator.share([page for page in other.pages if page != NULL_BLOCK])
        other.tokens = self.tokens.copy()
        other._node = self._node
        return other

    def restorable(self, length: int) -> int:
        """The largest length up to ``length`` that the sequence can be cut to and go on from."""
        size = self.allocator.block_size
        if length >= self.length or not self.reach:
            return min(length, self.length)
        if self.stride:
            length = length // size * size
        while length > 0 and NULL_BLOCK in self.pages[self.first_read(length) : -(-length // size)]:
            length = (length - 1) // size * size
        return length

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on, with the pages that only they needed, reserved ones included.

        Raises ValueError outside 0..length and for a length that is not ``restorable``.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length is {length}; 0 to {self.length} are allowed.")
        if self.restorable(length) != length:
            raise ValueError(f"length is {length}; the state is kept up to {self.restorable(length)}.")
        size = self.allocator.block_size
        if self._node is not None:
            for _ in range(self.length // size - length // size):
                assert self._node is not None
                self._node = self._node.parent
        keep = -(-length // size)
        dropped, self.pages = self.pages[keep:], self.pages[:keep]
        stale = [copy for copy in self._copies if copy[1] in dropped]
        self._copies = [copy for copy in self._copies if copy[1] not in dropped]
        self.allocator.free([source for source, _ in stale])
        self.allocator.free([page for page in dropped if page != NULL_BLOCK])
        del self.tokens[length:]

    def release(self) -> None:
        """Give every page back and be empty again; registered pages stay matchable until evicted.

        Pending copies are dropped.
        """
        self.truncate(0)

    def _last_page_is_shared(self) -> bool:
        """Whether the next token goes into a page that is partly filled and held by others too."""
        size = self.allocator.block_size
        return self.length % size != 0 and self.allocator.refcount(self.pages[self.length // size]) > 1


def longest_prefix(tables: Sequence[BlockTable], nodes: Sequence[Sequence[PrefixNode]]) -> int:
    """Pages of the longest prefix from which every one of ``tables`` can go on; ``nodes``: what each knows of it."""
    for pages in range(min(len(known) for known in nodes), 0, -1):
        if all(table.suffices(known, pages) for table, known in zip(tables, nodes, strict=True)):
            return pages
    return 0
