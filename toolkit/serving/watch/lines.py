"""A file of steps, a line of JSON each, that grows while it is read, and is cut where a run is resumed."""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    """Where a step's line is.

    Args:
        step: its number.
        first: byte at which it begins.
        size: its bytes, without the end of the line.
    """

    step: int
    first: int
    size: int


class StepFile:
    """The complete lines of a file, by step. Belongs to one thread at a time.

    Attributes:
        steps: in the order of the file.
        generation: grows where the file is found to be another one; positions of one mean nothing in the next.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[Step] = []
        self.generation = time.time_ns() // 10**6  # another one than those that an earlier server told
        self._last = b""  # the line before the end of what was read; a file without it there is another one

    @property
    def _end(self) -> int:
        return self.steps[-1].first + self.steps[-1].size + 1 if self.steps else 0

    def update(self) -> None:
        """Take in the lines that were added since the last call. A file that is not there has none."""
        try:
            with self.path.open("rb") as file:
                self._take(file.fileno())
        except FileNotFoundError:
            self._forget()

    def _forget(self) -> None:
        if self.steps:
            self.steps, self._last = [], b""
            self.generation += 1

    def _take(self, file: int) -> None:
        size = os.fstat(file).st_size
        at = self._end - len(self._last) - 1
        if self.steps and (size < self._end or os.pread(file, len(self._last), at) != self._last):
            self._forget()
        first = self._end
        for line in os.pread(file, size - first, first).split(b"\n")[:-1]:
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                return  # a crash has left it; the run that is resumed writes the file anew
            self.steps.append(Step(step, first, len(line)))
            self._last = line
            first += len(line) + 1

    def read(self, steps: list[Step]) -> list[bytes]:
        """The lines of some steps, in their order; none where the file is another one by now."""
        try:
            with self.path.open("rb") as file:
                found = [os.pread(file.fileno(), one.size, one.first) for one in steps]
        except FileNotFoundError:
            return []
        whole = all(len(line) == one.size and line.startswith(b"{") for line, one in zip(found, steps, strict=True))
        return found if whole else []
