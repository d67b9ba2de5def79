"""Which page already holds the state of which tokens.

A trie a weight version: a node stands for one full page of tokens after one exact prefix, and its children
are found by the real tokens of the next page. Python's own dict compares those tokens, and the path from
the root is the prefix, so two different prefixes can never be taken for one another, whatever their hashes.
"""

import itertools
from collections.abc import Hashable, Sequence
from weakref import WeakValueDictionary


class PrefixNode:
    """One full page of tokens after one exact prefix; ``page`` is where its state lies, None once evicted.

    A node lives while its page is registered, while a table stands on it, or while a longer prefix hangs from
    it. So a prefix whose first page was evicted becomes reachable again as soon as that page is recomputed.
    """

    __slots__ = ("__weakref__", "children", "page", "parent", "tokens", "version")

    def __init__(self, parent: "PrefixNode | None", tokens: tuple[int, ...], version: Hashable) -> None:
        self.parent = parent
        self.tokens = tokens
        self.version = version
        self.page: int | None = None
        self.children: WeakValueDictionary[tuple[int, ...], PrefixNode] = WeakValueDictionary()


class PrefixIndex:
    """Registered pages by (weight version, prefix, tokens of the page)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._roots: dict[Hashable, PrefixNode] = {}
        self._nodes: dict[int, PrefixNode] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def path(self, tokens: Sequence[int], version: Hashable) -> list[PrefixNode]:
        """Nodes of full pages from the first token on, as far as any is known; some may have no page."""
        node = self._roots.get(version)
        found: list[PrefixNode] = []
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            if node is None:
                break
            node = node.children.get(tuple(tokens[start : start + self.block_size]))
            if node is not None:
                found.append(node)
        return found

    def match(self, tokens: Sequence[int], version: Hashable) -> list[int]:
        """Pages that hold the longest registered prefix of ``tokens`` computed by weights ``version``."""
        pages = (node.page for node in self.path(tokens, version))
        return list(itertools.takewhile(lambda page: page is not None, pages))  # type: ignore[arg-type]

    def register(
        self, page: int | None, parent_key: PrefixNode | None, tokens_of_page: Sequence[int], version: Hashable
    ) -> PrefixNode:
        """Say that ``page`` holds ``tokens_of_page`` after the prefix ``parent_key`` (None: at the start).

        page: None where the tokens are passed over, so that what follows them hangs from them.
        Returns the key to pass as the next page's ``parent_key``. Where another page already holds the same
        tokens after the same prefix, that page stays the registered one. Raises ValueError for a page that is
        not full, is registered under other tokens, or follows a prefix of another version.
        """
        tokens = tuple(tokens_of_page)
        if len(tokens) != self.block_size:
            raise ValueError(f"page {page} has {len(tokens)} tokens; only full pages of {self.block_size} go in.")
        if parent_key is not None and parent_key.version != version:
            raise ValueError(f"version {version} cannot follow a prefix of version {parent_key.version}.")
        parent = parent_key
        if parent is None:
            parent = self._roots.setdefault(version, PrefixNode(None, (), version))
        node = parent.children.get(tokens)
        if node is None:
            node = PrefixNode(parent, tokens, version)
            parent.children[tokens] = node
        if page is None:
            return node
        if self._nodes.get(page, node) is not node:
            raise ValueError(f"page {page} is already registered with other tokens.")
        if node.page is None:
            node.page = page
            self._nodes[page] = node
        return node

    def drop(self, page: int) -> None:
        """Forget a registered page."""
        self._nodes.pop(page).page = None

    def drop_old_versions(self, version: Hashable) -> list[int]:
        """Forget every page that another version computed; returns those pages."""
        dropped = [page for page, node in self._nodes.items() if node.version != version]
        for page in dropped:
            self.drop(page)
        self._roots = {key: root for key, root in self._roots.items() if key == version}
        return dropped

    def check_integrity(self) -> None:
        """Raise AssertionError unless every registered page is found by walking its own prefix."""
        for page, node in self._nodes.items():
            assert node.page == page, f"page {page} is registered under a node that names page {node.page}"
            step = node
            while step.parent is not None:
                assert len(step.tokens) == self.block_size, f"page {page} hangs from a prefix that is not full"
                assert step.version == node.version, f"page {page} follows a prefix of another version"
                assert step.parent.children.get(step.tokens) is step, f"page {page} cannot be reached"
                step = step.parent
