"""Pages as numbers: who holds them, which are free, which are kept because their prefix may come back.

A page is in exactly one of three conditions: held (reference count above zero), cached (nobody holds it but
the prefix index knows its tokens; evicted least recently used first), or free.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from toolkit.state.prefix import PrefixIndex, PrefixNode


class OutOfBlocks(Exception):
    """More pages were asked for than are free or evictable; nothing was changed."""


class BlockAllocator:
    """Reference counts, the free list and the prefix index of ``num_blocks`` pages of ``block_size`` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 0 or block_size < 1:
            raise ValueError(f"num_blocks is {num_blocks} and block_size {block_size}; at least 0 and 1 are allowed.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.index = PrefixIndex(block_size)
        self._refcounts = [0] * num_blocks
        # A stack, lowest page on top: pages used last are still in the caches of the machine.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can hand out: free ones and evictable cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and whose prefix can still be matched."""
        return len(self._cached)

    def refcount(self, page: int) -> int:
        """How many holders a page has."""
        return self._refcounts[page]

    def allocate(self, n: int) -> list[int]:
        """``n`` pages, each held once. Cached pages are evicted only once no free page is left.

        Raises OutOfBlocks, changing nothing, when fewer than ``n`` are free or evictable.
        """
        if n > self.num_free:
            raise OutOfBlocks(f"{n} pages were asked for and {self.num_free} of {self.num_blocks} are available.")
        pages = []
        for _ in range(n):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self.index.drop(page)
            self._refcounts[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each page, held or cached.

        Raises ValueError, changing nothing, for a free one.
        """
        for page in pages:
            if self._refcounts[page] == 0 and page not in self._cached:
                raise ValueError(f"page {page} is free and cannot be shared.")
        for page in pages:
            self._cached.pop(page, None)
            self._refcounts[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One holder fewer for each page; the last holder's leaving caches a registered page, frees another.

        The last of ``pages`` becomes the least recently used: a page is useless without those before it.
        Raises ValueError, changing nothing, when a page would be freed more often than it is held.
        """
        for page, times in Counter(pages).items():
            if self._refcounts[page] < times:
                raise ValueError(f"page {page} is freed {times} times and held {self._refcounts[page]} times.")
        for page in reversed(pages):
            self._refcounts[page] -= 1
            if self._refcounts[page] == 0:
                if page in self.index:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def path(self, tokens: Sequence[int], version: Hashable) -> list[PrefixNode]:
        """Known full pages from the first token on, some perhaps without a page now; shares nothing."""
        return self.index.path(tokens, version)

    def register(
        self, page: int | None, parent_key: PrefixNode | None, tokens_of_page: Sequence[int], version: Hashable
    ) -> PrefixNode:
        """Enter a held, full page into the prefix index; see ``PrefixIndex.register``."""
        if page is not None and self._refcounts[page] == 0:
            raise ValueError(f"page {page} is held by nobody and cannot be registered.")
        return self.index.register(page, parent_key, tokens_of_page, version)

    def make_writable(self, page: int) -> bool:
        """Whether the one holder of ``page`` may write into it; False when it must be copied first.

        A registered page with a single holder leaves the prefix index, because its tokens are about to
        change.
        """
        if self._refcounts[page] != 1:
            return False
        if page in self.index:
            self.index.drop(page)
        return True

    def drop_old_versions(self, version: Hashable) -> None:
        """Forget every prefix that weights other than ``version`` computed; cached ones become free."""
        for page in self.index.drop_old_versions(version):
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)

    def drop_cached(self) -> None:
        """Forget every prefix whose pages nobody holds; they become free."""
        while self._cached:
            page, _ = self._cached.popitem()
            self.index.drop(page)
            self._free.append(page)

    def check_integrity(self, live: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError on any leak, double free or inconsistency.

        live: the pages that each holder holds (``BlockTable.held``), all of them; then every reference count must
        equal the number of times that the page is held.
        """
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is on the free list twice"
        assert not free & cached, "a page is both free and cached"
        for page, count in enumerate(self._refcounts):
            assert count >= 0, f"page {page} has reference count {count}"
            assert (count == 0) == (page in free or page in cached), f"page {page} is lost or free while held"
            assert page not in free or page not in self.index, f"page {page} is free and registered"
            assert page not in cached or page in self.index, f"page {page} is cached and not registered"
        assert free | cached <= set(range(self.num_blocks)), "a page that does not exist is free or cached"
        self.index.check_integrity()
        if live is not None:
            held = Counter(page for pages in live for page in pages)
            for page, count in enumerate(self._refcounts):
                assert count == held[page], f"page {page} is counted {count} times and held {held[page]} times"
