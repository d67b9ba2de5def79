"""Numbered requests of one client, which may arrive late, out of order or twice: each is applied once and in order."""

from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ordered(Generic[Item]):
    """Items numbered n, n + 1, n + 2 ... which come out in that order.

    Args:
        release: is called with each item in its turn.
        first: n.

    It is not locked: one thread at a time.
    """

    def __init__(self, release: Callable[[Item], None], first: int = 1) -> None:
        self._release = release
        self._next = first
        self._waiting: dict[int, Item] = {}

    def knows(self, number: int) -> bool:
        """Whether an item of this number has arrived."""
        return number < self._next or number in self._waiting

    def add(self, number: int, item: Item) -> None:
        """Take an item in, and release those whose turn it is. An item of a known number is left out."""
        if self.knows(number):
            return
        self._waiting[number] = item
        while self._next in self._waiting:
            self._next += 1
            self._release(self._waiting.pop(self._next - 1))
