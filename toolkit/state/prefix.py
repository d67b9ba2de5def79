"""Which block already holds the state of which tokens.

One trie per ``PrefixKey``: a node is one full block of tokens after one exact prefix, and its children are looked up
by the tokens of the next block. Python's dict compares those tokens, and the path from the root is the prefix, so two
different prefixes are never confused, even where hashes collide.
"""

import itertools
from collections.abc import Sequence
from weakref import WeakValueDictionary

from toolkit.state.prefix_key import PrefixKey, WeightKeys


class PrefixNode:
    """One full block of tokens after one exact prefix; ``block`` holds its state, None once evicted.

    ``digest`` is what names it outside of the pool, once asked for (``toolkit.state.offloading``).

    A node lives while its block is registered, while a block table refers to it, or while it has children. So a prefix
    whose first block was evicted can be matched again as soon as that block is recomputed.
    """

    __slots__ = ("__weakref__", "block", "children", "digest", "key", "parent", "tokens")

    def __init__(self, parent: "PrefixNode | None", tokens: tuple[int, ...], key: PrefixKey) -> None:
        self.parent = parent
        self.tokens = tokens
        self.key = key
        self.block: int | None = None
        self.digest: bytes | None = None
        self.children: WeakValueDictionary[tuple[int, ...], PrefixNode] = WeakValueDictionary()


class PrefixIndex:
    """Registered blocks by (key, prefix, tokens of the block)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._roots: dict[PrefixKey, PrefixNode] = {}
        self._nodes: dict[int, PrefixNode] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def path(self, tokens: Sequence[int], key: PrefixKey) -> list[PrefixNode]:
        """Nodes of full blocks from the first token on, as far as any is known; some may have no block."""
        node = self._roots.get(key)
        found: list[PrefixNode] = []
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            if node is None:
                break
            node = node.children.get(tuple(tokens[start : start + self.block_size]))
            if node is not None:
                found.append(node)
        return found

    def match(self, tokens: Sequence[int], key: PrefixKey) -> list[int]:
        """Blocks that hold the longest registered prefix of ``tokens`` under ``key``."""
        blocks = (node.block for node in self.path(tokens, key))
        return list(itertools.takewhile(lambda block: block is not None, blocks))  # type: ignore[arg-type]

    def register(
        self, block: int | None, parent: PrefixNode | None, block_tokens: Sequence[int], key: PrefixKey
    ) -> PrefixNode:
        """The node of ``block_tokens`` after a prefix, from now on held by ``block``: the next block's ``parent``.

        Where another block already holds the same tokens after the same prefix, that block stays registered.

        Args:
            block: None where no block keeps the state of these tokens, so that the next ones still have a parent.
            parent: node of the prefix; None at the start.
            block_tokens: a full block of tokens.
            key: of the sequence.

        Raises:
            ValueError: for a block that is not full, is registered under other tokens, or follows a prefix of another
                key.
        """
        tokens = tuple(block_tokens)
        if len(tokens) != self.block_size:
            raise ValueError(f"block {block} must be full with {self.block_size} tokens, got {len(tokens)}.")
        if parent is not None and parent.key != key:
            raise ValueError(f"key must be that of the prefix, {parent.key!r}, got {key!r}.")
        if parent is None:
            parent = self._roots.setdefault(key, PrefixNode(None, (), key))
        node = parent.children.get(tokens)
        if node is None:
            node = PrefixNode(parent, tokens, key)
            parent.children[tokens] = node
        if block is None:
            return node
        if self._nodes.get(block, node) is not node:
            raise ValueError(f"block {block} must be registered once, got other tokens.")
        if node.block is None:
            node.block = block
            self._nodes[block] = node
        return node

    def drop(self, block: int) -> PrefixNode:
        """Forget a registered block; returns what it was registered under."""
        node = self._nodes.pop(block)
        node.block = None
        return node

    def roots(self) -> list[PrefixNode]:
        """The empty prefix of each key."""
        return list(self._roots.values())

    def registered(self) -> list[PrefixNode]:
        """The nodes of all registered blocks."""
        return list(self._nodes.values())

    def drop_outdated(self, current: PrefixKey | WeightKeys) -> list[int]:
        """Forget every block whose key ``current`` outdates; returns those blocks."""
        dropped = [block for block, node in self._nodes.items() if current.outdates(node.key)]
        for block in dropped:
            self.drop(block)
        self._roots = {key: root for key, root in self._roots.items() if not current.outdates(key)}
        return dropped

    def check_integrity(self) -> None:
        """Raise AssertionError unless every registered block is found by walking its own prefix."""
        for block, node in self._nodes.items():
            assert node.block == block, f"block {block} is registered under a node that names block {node.block}"
            step = node
            while step.parent is not None:
                assert len(step.tokens) == self.block_size, f"block {block} hangs from a prefix that is not full"
                assert step.key == node.key, f"block {block} follows a prefix of another key"
                assert step.parent.children.get(step.tokens) is step, f"block {block} cannot be reached"
                step = step.parent
