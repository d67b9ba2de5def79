"""The prefix tree as an outline for people: runs of blocks without their tokens."""

from typing import NamedTuple

from toolkit.state.block_allocator import BlockAllocator
from toolkit.state.prefix import PrefixNode


class PrefixRun(NamedTuple):
    """Blocks that follow one another without a branch.

    Args:
        depth: runs before it on the way from the root.
        blocks: how many; those that were evicted in the middle of a prefix are not counted.
        held: whether sequences hold them; others are cached.
        version: of the weights that computed them.
        adapter: that they belong to; "" for the model itself.
    """

    depth: int
    blocks: int
    held: bool
    version: int
    adapter: str


def prefix_runs(allocator: BlockAllocator, most: int) -> list[PrefixRun]:
    """Runs of the registered blocks, depth first, those of one parent in the order in which they came.

    Args:
        allocator: whose prefix index is read.
        most: runs that are returned; further ones are left out.
    """
    found: list[PrefixRun] = []
    waiting: list[tuple[int, PrefixNode]] = []

    def add_children(node: PrefixNode, depth: int) -> None:
        waiting.extend((depth, child) for child in reversed(list(node.children.values())))

    for root in reversed(allocator.prefix_index.roots()):
        add_children(root, 0)
    while waiting and len(found) < most:
        depth, node = waiting.pop()
        held, blocks = _held(allocator, node), int(node.block is not None)
        while len(node.children) == 1:
            (child,) = node.children.values()
            if _held(allocator, child) != held:
                break
            node, blocks = child, blocks + (child.block is not None)
        if blocks:
            found.append(PrefixRun(depth, blocks, held, node.key.weights, node.key.adapter or ""))
        add_children(node, depth + bool(blocks))
    return found


def _held(allocator: BlockAllocator, node: PrefixNode) -> bool:
    return node.block is not None and allocator.ref_count(node.block) > 0
