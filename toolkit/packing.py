"""Items of several tokens in batches of a bounded number of tokens."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def in_batches(items: Iterable[T], tokens: Callable[[T], int], most: int) -> list[list[T]]:
    """Items in order, in batches of at most ``most`` tokens; a larger item has a batch to itself."""
    batches: list[list[T]] = []
    room = 0
    for item in items:
        if not batches or tokens(item) > room:
            batches.append([])
            room = most
        batches[-1].append(item)
        room -= tokens(item)
    return batches
