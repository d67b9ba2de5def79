"""What an offloaded block is: its content under a digest of all the tokens up to its end.

A digest is SHA-256 over the digest of the prefix before the block and the block's tokens. The first one is over what a
``PrefixKey`` has besides versions, which differ between processes; an entry carries the whole key beside it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from toolkit.state.prefix import PrefixNode
from toolkit.state.prefix_key import PrefixKey

EntryId: TypeAlias = tuple[int, bytes]
"""Index of a group of layers, and the digest."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A block of one group of layers.

    Args:
        id: its group and digest.
        key: of the prefix.
        content: [bytes] uint8 on the CPU, as ``StatePool.pack`` returns a block.
    """

    id: EntryId
    key: PrefixKey
    content: Tensor


def root_digest(key: PrefixKey) -> bytes:
    """The digest of no tokens."""
    return hashlib.sha256(repr((key.adapter, key.salt, key.rotary, key.prompt)).encode()).digest()


def next_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a prefix and one more block of tokens."""
    return hashlib.sha256(before + ",".join(map(str, tokens)).encode()).digest()


def prefix_digests(tokens: Sequence[int], block_size: int, key: PrefixKey) -> list[bytes]:
    """The digest up to the end of each full block of ``tokens``."""
    digest, found = root_digest(key), []
    for end in range(block_size, len(tokens) + 1, block_size):
        digest = next_digest(digest, tokens[end - block_size : end])
        found.append(digest)
    return found


def node_digest(node: PrefixNode) -> bytes:
    """The digest up to the end of a node's block; kept in the node and in those before it."""
    chain = []
    at: PrefixNode | None = node
    while at is not None and at.digest is None:
        chain.append(at)
        at = at.parent
    for one in reversed(chain):
        before = one.parent.digest if one.parent is not None else None
        one.digest = root_digest(one.key) if before is None else next_digest(before, one.tokens)
    assert node.digest is not None
    return node.digest
