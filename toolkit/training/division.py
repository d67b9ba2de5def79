"""Which entries of an ordered list each process reads, also where their number has changed in the middle of one."""

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Positions = list[list[Any]]
"""Of each process: the number of the list that it reads, in any order that ``max`` knows, and how many entries of its
share it has read."""


class Division:
    """Every ``world_size``-th entry for each process, from the one of its rank.

    Args:
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._before: list[Positions] = []

    def share(self, entries: Sequence[T], number: Any) -> list[T]:
        """This process's entries of list ``number``, without those that other numbers of processes have read."""
        left = list(entries)
        for positions in self._before:
            read: set[int] = set()
            for rank, (at, done) in enumerate(positions):
                share = range(rank, len(left), len(positions))
                read.update(share if at > number else share[:done] if at == number else ())
            left = [entry for index, entry in enumerate(left) if index not in read]
        return left[self.rank :: self.world_size]

    def leaves_out(self, number: Any) -> bool:
        """Whether other numbers of processes have read of list ``number``."""
        return bool(self.state_dict(number))

    def state_dict(self, number: Any) -> dict[str, Any]:
        """What is still to be left out from list ``number`` on, as JSON."""
        before = [positions for positions in self._before if max(at for at, _ in positions) >= number]
        return {"before": before} if before else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._before = list(state.get("before", ()))

    def follow(self, states: Sequence[dict[str, Any]], positions: Positions) -> None:
        """Continue where so many processes were.

        Args:
            states: that each of them wrote.
            positions: theirs.
        """
        self.load_state_dict(states[0])  # equal in all, but for what no process needs any more
        for state in states[1:]:
            if len(state.get("before", ())) > len(self._before):
                self.load_state_dict(state)
        self._before.append(positions)
