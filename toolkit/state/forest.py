"""The forest of sequences: each one's pages in order, shared with the sequences that have the same prefix."""

from collections.abc import Hashable, Sequence

from toolkit.state.allocator import PageAllocator
from toolkit.state.prefix import PrefixNode


class Table:
    """One sequence's block table.

    A step is ``reserve(n)`` (slots for the next n tokens), then the page copies of ``take_copies()``, then
    the forward that fills the slots, then ``commit(tokens)``, which alone moves ``length``. A step that
    fails before its commit leaves nothing to undo: the next ``reserve`` returns the same slots.

    version: of the weights that compute the sequence; None keeps it out of the prefix index.
    pages: physical pages in order, reserved ones included.
    tokens: those whose state is written.
    """

    def __init__(self, allocator: PageAllocator, version: Hashable | None) -> None:
        self.allocator = allocator
        self.version = version
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
        return self.pages + [source for source, _ in self._copies]

    def match_prefix(self, tokens: Sequence[int]) -> int:
        """Share the pages of the longest cached prefix of a prompt; returns how many tokens that covers.

        Whole pages of the same weight version only, and never the whole prompt: its last token must run,
        since what is wanted is that token's output. Raises RuntimeError unless the table is empty.
        """
        if self.pages:
            raise RuntimeError("match_prefix needs an empty table.")
        if self.version is None:
            return 0
        nodes = self.allocator.match(tokens[: len(tokens) - 1], self.version)
        if nodes:
            pages = [node.page for node in nodes if node.page is not None]
            self.allocator.share(pages)
            self.pages = pages
            self.tokens = [token for node in nodes for token in node.tokens]
            self._node = nodes[-1]
        return self.length

    def pages_needed(self, n: int) -> int:
        """Pages that ``reserve(n)`` would take from the allocator."""
        fresh = max(0, -(-(self.length + n) // self.allocator.page_size) - len(self.pages))
        return fresh + (n > 0 and self._last_page_is_shared())

    def reserve(self, n: int) -> list[int]:
        """Slots (page * page_size + place) for the next ``n`` tokens.

        Takes new pages as needed. A page that is partly filled and shared is replaced by a new one, and the
        copy is left for ``take_copies``. Raises OutOfPages with the table unchanged.
        """
        if n <= 0:
            return []
        size = self.allocator.page_size
        tail = self.length // size
        copy = self._last_page_is_shared()
        fresh = self.allocator.allocate(self.pages_needed(n))
        if copy:
            # The source stays held until the copy is taken, so that nobody else can be given it before.
            self._copies.append((self.pages[tail], fresh[0]))
            self.pages[tail] = fresh.pop(0)
        elif self.length % size:
            self.allocator.make_writable(self.pages[tail])
        self.pages += fresh
        return [self.pages[at // size] * size + at % size for at in range(self.length, self.length + n)]

    def take_copies(self) -> list[tuple[int, int]]:
        """Pending (source, destination) page copies, to be run in order before the slots are filled."""
        copies, self._copies = self._copies, []
        self.allocator.free([source for source, _ in copies])
        return copies

    def commit(self, tokens: Sequence[int], version: Hashable | None = None) -> None:
        """Say that the next reserved slots now hold the state of ``tokens``; full pages become matchable.

        version: of the weights that wrote them, where known. Once it differs from the table's, the sequence
        is of two minds and none of its later pages is ever registered.
        Raises RuntimeError for more tokens than were reserved.
        """
        size = self.allocator.page_size
        if self.length + len(tokens) > len(self.pages) * size:
            room = len(self.pages) * size - self.length
            raise RuntimeError(f"{len(tokens)} tokens were committed and {room} slots are reserved.")
        if version is not None and version != self.version:
            self.version = self._node = None
        full = self.length // size
        self.tokens += tokens
        if self.version is None:
            return
        for at in range(full, self.length // size):
            page_tokens = self.tokens[at * size : (at + 1) * size]
            self._node = self.allocator.register(self.pages[at], self._node, page_tokens, self.version)

    def fork(self) -> "Table":
        """A second sequence with the same past. Pages are shared; whoever writes into a shared one copies it.

        Raises RuntimeError while copies are pending, since the shared page would not hold its contents yet.
        """
        if self._copies:
            raise RuntimeError("take_copies must be called before fork.")
        other = Table(self.allocator, self.version)
        other.pages = self.pages[: -(-self.length // self.allocator.page_size)]
        self.allocator.share(other.pages)
        other.tokens = self.tokens.copy()
        other._node = self._node
        return other

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on, with the pages that only they needed, reserved ones included.

        Raises ValueError outside 0..length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length is {length}; 0 to {self.length} are allowed.")
        size = self.allocator.page_size
        if self._node is not None:
            for _ in range(self.length // size - length // size):
                assert self._node is not None
                self._node = self._node.parent
        keep = -(-length // size)
        dropped, self.pages = self.pages[keep:], self.pages[:keep]
        stale = [copy for copy in self._copies if copy[1] in dropped]
        self._copies = [copy for copy in self._copies if copy[1] not in dropped]
        self.allocator.free([source for source, _ in stale])
        self.allocator.free(dropped)
        del self.tokens[length:]

    def release(self) -> None:
        """Give every page back and be empty again; registered pages stay matchable until evicted.

        Pending copies are dropped.
        """
        self.truncate(0)

    def _last_page_is_shared(self) -> bool:
        """Whether the next token goes into a page that is partly filled and held by others too."""
        size = self.allocator.page_size
        return self.length % size != 0 and self.allocator.refcount(self.pages[self.length // size]) > 1
