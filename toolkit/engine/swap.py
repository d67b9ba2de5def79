"""Host memory for the state of preempted sequences."""

from dataclasses import dataclass

from toolkit.state import BlockManager, BlockTables, StatePool
from toolkit.state.block_manager import Swapped
from toolkit.state.kinds import Rows


@dataclass(frozen=True)
class SwappedState:
    """A sequence's state on the host: where its blocks belong, and what they hold."""

    shape: Swapped
    contents: list[Rows]

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for rows in self.contents for part in rows)


class SwapSpace:
    """At most ``capacity`` bytes of swapped state; None for no bound, 0 for none."""

    def __init__(self, pool: StatePool, block_manager: BlockManager, capacity: int | None) -> None:
        self.pool = pool
        self.block_manager = block_manager
        self.capacity = capacity
        self.used = 0
        self.count = 0
        block_bytes = StatePool.block_bytes(pool.specs, pool.block_size, pool.dtype)
        self._block_bytes = [block_bytes[group] for group in pool.groups]

    def swap_out(self, tables: BlockTables, unlimited: bool = False) -> SwappedState | None:
        """Move a sequence's state to the host and release its blocks; None, changing nothing, without room."""
        blocks = tables.held_blocks()
        size = sum(len(held) * each for held, each in zip(blocks, self._block_bytes, strict=True))
        if not tables.length or (not unlimited and self.capacity is not None and self.used + size > self.capacity):
            return None
        self.pool.copy_blocks(tables.take_copies())
        blocks = tables.held_blocks()
        swapped = SwappedState(tables.swap_out(), self.pool.swap_out(blocks))
        self.used += swapped.bytes
        self.count += 1
        return swapped

    def swap_in(self, swapped: SwappedState) -> BlockTables:
        """The sequence on new blocks. Raises OutOfBlocks, changing nothing."""
        tables = swapped.shape.restore(self.block_manager)
        self.pool.swap_in(tables.held_blocks(), swapped.contents)
        self.drop(swapped)
        return tables

    def drop(self, swapped: SwappedState) -> None:
        """Forget a swapped state."""
        self.used -= swapped.bytes
