"""Room on the host for the state of sequences that had to give up their pages."""

from dataclasses import dataclass

from toolkit.state import Memory, StatePool, Tables
from toolkit.state.kinds import Rows
from toolkit.state.memory import Swapped


@dataclass(frozen=True)
class SwappedState:
    """A sequence's state on the host: where its pages belong, and what they hold."""

    shape: Swapped
    contents: list[Rows]

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for rows in self.contents for part in rows)


class SwapSpace:
    """At most ``capacity`` bytes of swapped state; None for any amount, 0 for none."""

    def __init__(self, pool: StatePool, memory: Memory, capacity: int | None) -> None:
        self.pool = pool
        self.memory = memory
        self.capacity = capacity
        self.used = 0
        self.count = 0
        page_bytes = StatePool.page_bytes(pool.specs, pool.page_size, pool.dtype)
        self._page_bytes = [page_bytes[group] for group in pool.groups]

    def out(self, tables: Tables, unlimited: bool = False) -> SwappedState | None:
        """Move a sequence's state to the host and release its pages; None, changing nothing, where there is no room."""
        pages = tables.held_pages()
        size = sum(len(held) * each for held, each in zip(pages, self._page_bytes, strict=True))
        if not tables.length or (not unlimited and self.capacity is not None and self.used + size > self.capacity):
            return None
        self.pool.copy_pages(tables.take_copies())
        pages = tables.held_pages()
        swapped = SwappedState(tables.give_up(), self.pool.swap_out(pages))
        self.used += swapped.bytes
        self.count += 1
        return swapped

    def back(self, swapped: SwappedState) -> Tables:
        """The sequence on new pages. Raises OutOfPages, changing nothing."""
        tables = swapped.shape.restore(self.memory)
        self.pool.swap_in(tables.held_pages(), swapped.contents)
        self.drop(swapped)
        return tables

    def drop(self, swapped: SwappedState) -> None:
        """Forget a swapped state."""
        self.used -= swapped.bytes
