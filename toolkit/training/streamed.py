"""Datasets that are read as they are trained on: no index, a shuffle within a buffer, a position that resumes."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError
from toolkit.training.corpus import digest
from toolkit.training.division import Division
from toolkit.training.examples import check_misses
from toolkit.training.jsonl import Line
from toolkit.training.rows import open_rows, without_nulls

if TYPE_CHECKING:
    from datasets import IterableDataset

    from toolkit.config.objective import DatasetSection

FIRST_LINES = 1000
"""Lines of a stream that are looked at before the first step."""


def open_stream(section: "DatasetSection", field: str) -> "IterableDataset":
    """The stream of a section of a recipe. Raises ToolkitError in one sentence where there is none."""
    found: IterableDataset = open_rows(section, field, streaming=True)
    return found if section.max_samples is None else found.take(section.max_samples)


class StreamOfRows:
    """One pass over the rows of a dataset, with a position.

    Args:
        rows: of ``datasets``.
        name: of the dataset.
    """

    def __init__(self, rows: "IterableDataset", name: str) -> None:
        self._rows, self._name = rows, name
        self._count = 0
        self._state: Any = None
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> "StreamOfRows":
        return self

    def __next__(self) -> Line:
        if self._iterator is None:
            self._iterator = iter(self._rows)
        row = next(self._iterator)
        self._count += 1
        return Line(self._count, without_nulls(row), self._name)

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""
        return {"count": self._count, "rows": self._state if self._iterator is None else self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of the same rows. To be called before the first row is read."""
        self._count, self._state = state["count"], state["rows"]
        if self._state is not None:
            self._rows.load_state_dict(deepcopy(self._state))


class ShuffledStream:
    """Endless lines of a stream, shuffled in blocks of ``buffer_size``, pass after pass; every process its share.

    Args:
        open_pass: opens the rows anew.
        trained: whether a line is trained on.
        read: gives a line's columns their names.
        seed: of the order.
        buffer_size: lines of a block, over all processes.
        rank: of this process.
        world_size: number of processes. Each reads all rows and takes its share of every block.
    """

    def __init__(
        self,
        open_pass: Callable[[], StreamOfRows],
        trained: Callable[[Line], bool],
        read: Callable[[Line], Line],
        seed: int,
        buffer_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._open, self._trained, self._read, self._seed = open_pass, trained, read, seed
        self._size, self._division = buffer_size, Division(rank, world_size)
        self._epoch, self._number, self._done = 0, 0, 0
        self._rows = self._open()
        self._before = self._rows.state_dict()
        self._block: list[Line] = []
        self._left_out = False
        self._filled = False

    def _fill(self) -> None:
        """Read the block that begins where the rows are."""
        self._before = self._rows.state_dict()
        lines: list[Line] = []
        misses = 0
        for line in self._rows:
            misses += 1
            check_misses(misses)
            if self._trained(line):
                misses = 0
                lines.append(self._read(line))
                if len(lines) == self._size:
                    break
        salt = f"{self._seed}/{self._epoch}/{self._number}"
        order = sorted(range(len(lines)), key=lambda at: digest(f"{salt}/{at}"))
        number = [self._epoch, self._number]
        self._block = self._division.share([lines[at] for at in order], number)
        self._left_out = bool(lines) and self._division.leaves_out(number)
        self._filled = True

    def take(self, count: int) -> list[Any]:
        """The next ``count`` lines."""
        taken: list[Any] = []
        while len(taken) < count:
            if not self._filled:
                self._fill()
            if self._done < len(self._block):
                taken.append(self._block[self._done])
                self._done += 1
                continue
            self._filled, self._done = False, 0
            if self._block or self._left_out:
                self._number += 1
                continue
            if not self._number:
                raise ToolkitError("objective.datasets[0] must have lines to train on for every process, got none.")
            self._epoch, self._number, self._rows = self._epoch + 1, 0, self._open()
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON: where the block begins, and how far it is read."""
        begin = self._before if self._filled else self._rows.state_dict()
        before = self._division.state_dict([self._epoch, self._number])
        return {"epoch": self._epoch, "block": self._number, "done": self._done, "rows": begin, **before}

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        """Go to where the streams of another number of processes were."""
        positions = [[[state["epoch"], state["block"]], state["done"]] for state in states]
        self.load_state_dict({**states[positions.index(min(positions))], "done": 0})
        self._division.follow(states, positions)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a stream with the same arguments."""
        self._division.load_state_dict(state)
        self._epoch, self._number, self._done = state["epoch"], state["block"], state["done"]
        self._rows = self._open()
        self._rows.load_state_dict(state["rows"])
        self._filled = False
