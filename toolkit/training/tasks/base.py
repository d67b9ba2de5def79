"""What a verifiable task is: synthetic problems, and a reward that checks a completion."""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from toolkit.errors import ToolkitError, first_line
from toolkit.registry import Registry
from toolkit.training.corpus import digest
from toolkit.training.division import Division

CHUNK = 256
_LARGEST = 3.4e38
"""Of a reward, in float32, so that the variance of a group is finite in float64."""


@dataclass(frozen=True)
class Problem:
    """A prompt, one right completion of it, and a wrong one.

    Attributes:
        key: identifies the problem. The held-out split is by its hash, so spellings of one problem share it.
        entry: what the task keeps to judge it.
    """

    prompt: str
    solution: str
    wrong: str
    key: str
    entry: Any = None


class Task(ABC):
    """Problems by seed, and a reward. The constructor takes the recipe's ``task`` fields beside ``name``.

    ``class Countdown(Task, name="countdown")`` registers a task of this package; one from elsewhere needs no name.
    """

    takes_variant: ClassVar[str | None] = None
    """The field that stands behind a colon in ``objective.task.name``; None for none."""

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            TASKS.add(name, cls)

    @abstractmethod
    def make(self, seed: int, count: int) -> list[Problem]:
        """``count`` problems: a function of the arguments alone."""

    @abstractmethod
    def reward(self, prompt: str, completion: str) -> float | None:
        """How good ``completion`` is, for any text: 1 is solved. Never raises, never runs the text.

        None (or NaN) where it cannot be judged: the completion then has no part in its group's mean, and no advantage.
        """

    def judge(self, problem: Problem, completion: str) -> float | None:
        """``reward``, of a problem."""
        return self.reward(problem.prompt, completion)


TASKS: Registry[Task] = Registry("toolkit.training.tasks")


def imported(name: str, field: str, what: str) -> Any:
    """What ``module:attribute`` names. Raises ToolkitError, naming ``field``, where it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ToolkitError(f"{field} must be {what} to import, got '{name}' ({error}).") from None


_SHOWN = 200
"""Characters of a value in an error's sentence."""


def checked_reward(task: Task, problem: Problem | str, completion: str) -> float:
    """``task.reward`` of a prompt, or ``task.judge`` of a problem, as a float.

    It is finite, or NaN where the task does not judge the completion.

    Raises:
        ToolkitError: the task's method raised, or returned something other than a finite number, NaN or None. A number
            is any that ``float`` takes, such as a scalar of numpy or a tensor of one element, but no text.
    """
    where = f"the reward of the task {type(task).__name__}"
    with call_checked(where, f"the completion {_shown(completion)}"):
        value: Any = (
            task.judge(problem, completion) if isinstance(problem, Problem) else task.reward(problem, completion)
        )
    return finite_reward(value, where, completion)


@contextmanager
def call_checked(where: str, what: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around a call of the user's code: what it raises becomes a ToolkitError with the line that raised.

    Args:
        where: what is called.
        what: it is called for.
        passing: exceptions that stay as they are.
    """
    try:
        yield
    except passing:
        raise
    except (Exception, SystemExit) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        at = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
        raise ToolkitError(f"{where} raised {type(error).__name__}{at} for {what}: {first_line(error)}.") from error


def finite_reward(value: Any, where: str, completion: Any) -> float:
    """A reward as a float: finite, or NaN for None. Raises ToolkitError, naming ``where``, for anything else."""
    if value is None:
        return math.nan
    try:
        value = value.item() if hasattr(value, "item") else value  # a scalar of numpy, a tensor
        reward = math.inf if isinstance(value, str | bytes) else float(value)
    except Exception:  # an object of any class may stand here
        reward = math.inf
    if abs(reward) > _LARGEST:
        raise ToolkitError(
            f"{where} must be a finite number, or None where it does not apply, got {_shown(value)} for the "
            f"completion {_shown(completion)}."
        )
    return reward


class ProblemStream:
    """Endless problems of one side of a task's split, every process its share; the position is one number.

    A problem is held out when hash(key) / 2^64 < ``val_set_size``, for every seed: what is trained on is never
    measured.
    """

    def __init__(
        self, task: Task, seed: int, val_set_size: float, *, held_out: bool = False, rank: int = 0, world_size: int = 1
    ) -> None:
        self._task, self._seed, self._held_out = task, seed, held_out
        self._threshold, self._division = int(val_set_size * 2**64), Division(rank, world_size)
        self._chunk, self._done = 0, 0
        self._left: Iterator[Problem] | None = None

    def _problems(self) -> Iterator[Problem]:
        made = self._task.make(digest(f"{self._seed}/{self._held_out}/{self._chunk}"), CHUNK)
        side = [problem for problem in made if (digest(problem.key) < self._threshold) == self._held_out]
        return iter(self._division.share(side, self._chunk))

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
        return {"chunk": self._chunk, "done": self._done, **self._division.state_dict(self._chunk)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a stream with the same arguments."""
        self._division.load_state_dict(state)
        self._chunk, self._done, self._left = state["chunk"], 0, None
        self.take(state["done"])

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        """Go to where the streams of another number of processes were."""
        self._division.follow(states, [[state["chunk"], state["done"]] for state in states])
        self._chunk, self._done, self._left = min(state["chunk"] for state in states), 0, None


def _shown(value: Any) -> str:
    """A value in an error's sentence: no more than a line of it."""
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, or a class of the task's
        return f"an object of {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
