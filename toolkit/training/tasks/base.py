"""What a verifiable task is: problems made on the spot, and a reward that checks an answer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolkit.training.corpus import digest

CHUNK = 256


@dataclass(frozen=True)
class Problem:
    """A prompt, one right completion of it, and a wrong one.

    key: what makes two problems the same one. Held-out problems are told apart by it, so spellings of one problem
    share it.
    """

    prompt: str
    solution: str
    wrong: str
    key: str


class Task(ABC):
    """Problems by seed, and a reward. The constructor takes the recipe's ``task`` fields beside ``name``."""

    @abstractmethod
    def make(self, seed: int, count: int) -> list[Problem]:
        """``count`` problems: a function of the arguments alone."""

    @abstractmethod
    def reward(self, prompt: str, completion: str) -> float:
        """How good ``completion`` is, for any text whatever: 1 is solved. Never raises, never runs the text."""


class ProblemStream:
    """Endless problems of one side of a task's split, every process its share; the position is one number.

    A problem is held out when hash(key) / 2^64 < ``share``: for good, whatever the seed, so what is trained on and what
    is measured never meet.
    """

    def __init__(
        self, task: Task, seed: int, share: float, *, held_out: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self._task, self._seed, self._held_out = task, seed, held_out
        self._threshold, self._rank, self._world = int(share * 2**64), rank, world
        self._chunk, self._done = 0, 0
        self._left: Iterator[Problem] | None = None

    def _problems(self) -> Iterator[Problem]:
        made = self._task.make(digest(f"{self._seed}/{self._held_out}/{self._chunk}"), CHUNK)
        side = [problem for problem in made if (digest(problem.key) < self._threshold) == self._held_out]
        return iter(side[self._rank :: self._world])

    def take(self, count: int) -> list[Problem]:
        """The next ``count`` problems."""
        taken: list[Problem] = []
        while len(taken) < count:
            if self._left is None:
                self._left = self._problems()
            problem = next(self._left, None)
            if problem is None:
                self._chunk, self._done, self._left = self._chunk + 1, 0, None
            else:
                self._done += 1
                taken.append(problem)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""
        return {"chunk": self._chunk, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a stream with the same arguments."""
        self._chunk, self._done, self._left = state["chunk"], 0, None
        self.take(state["done"])
