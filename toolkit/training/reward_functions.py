"""Reward functions as TRL has them: called once for all completions of a step, by name, with the lines' columns."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import PurePath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.errors import ToolkitError, first_line
from toolkit.training.background_loop import LOOP, is_async
from toolkit.training.reward_models import RewardModelFunction
from toolkit.training.tasks.base import call_checked, finite_reward, imported
from toolkit.training.timed_call import TookTooLong, awaited_within, timed_call

if TYPE_CHECKING:
    import torch

    from toolkit.config import Recipe

RewardFunction = Callable[..., Any]
IMPORTABLE = re.compile(r"[\w.]+:\w+")
"""What names a function; anything else, with a slash, is a folder or repository of a reward model."""


class Rewards(NamedTuple):
    """What the functions made of completions.

    Args:
        totals: the weighted sum of each completion; NaN where no function applies to it, or one failed.
        by_function: what each function returned for each completion; NaN where it does not apply or failed.
        failures: for each function how many completions it failed for, and what the first failure was.
    """

    totals: list[float]
    by_function: list[list[float]]
    failures: list["Failures"]


@dataclass
class Failures:
    """Completions that a function failed for: it raised, took too long, or returned NaN."""

    count: int = 0
    first: str = ""

    def add(self, sentence: str) -> float:
        """One more; the reward that stands for it."""
        self.count += 1
        self.first = self.first or sentence
        return math.nan


def load_reward_functions(names: Sequence[str]) -> list[RewardFunction]:
    """The functions and reward models of ``objective.reward_funcs``.

    Raises:
        ToolkitError: one cannot be imported or called, or is no reward model.
    """
    found: list[RewardFunction] = []
    for at, name in enumerate(names):
        if not IMPORTABLE.fullmatch(name):
            found.append(RewardModelFunction(name, f"objective.reward_funcs[{at}]"))
            continue
        function = imported(name, f"objective.reward_funcs[{at}]", "a function")
        if not callable(function):
            raise ToolkitError(f"objective.reward_funcs[{at}] must be a function, got '{name}'.")
        found.append(function)
    return found


@dataclass
class RewardFunctions:
    """The functions of a recipe with their weights.

    Asynchronous ones run at the same time, and beside the plain ones, which run one after the other. A function that
    raises is called again for each completion alone, so that one completion fails alone. A completion that a function
    fails for has no reward, even where others judge it; a function that returns None does not apply to it, and the
    others judge it.

    Args:
        names: of each, for metrics and errors.
        functions: with TRL's signature.
        weights: of each; None is 1 each.
        timeout: seconds that a function may take for a step's completions; None is no bound. What is not there then
            has failed.

    Attributes:
        trainer_state: what functions get under this name: ``global_step`` and ``max_steps``.
        logged: values that functions gave to ``log_metric`` since ``take_logged``.
    """

    names: Sequence[str]
    functions: Sequence[RewardFunction]
    weights: Sequence[float] | None = None
    timeout: float | None = None
    trainer_state: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(global_step=0, max_steps=0))
    logged: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights is None:
            self.weights = [1.0] * len(self.names)
        self.names = _distinct(self.names)
        self._worked = [False] * len(self.names)

    @classmethod
    def load(
        cls, names: Sequence[str], weights: Sequence[float] | None = None, timeout: float | None = None
    ) -> "RewardFunctions":
        """Those of ``module:function``, and reward models; short names, with the module where two are the same."""
        short = [name.partition(":")[2] if IMPORTABLE.fullmatch(name) else PurePath(name).name for name in names]
        labels = [one if short.count(one) == 1 else name for one, name in zip(short, names)]
        return cls(labels, load_reward_functions(names), weights, timeout)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Sequence[Mapping[str, Any]],
    ) -> Rewards:
        """The rewards of completions.

        Args:
            prompts: text or messages, one for each completion.
            completions: text, or a list of the assistant's message, as the prompt is.
            completion_ids: tokens of each.
            columns: of the line of each; a function gets them as lists, None where a line lacks one.

        Raises:
            ToolkitError: a function has never worked and failed for all completions, returned other than a list of one
                value for each, or a value that is no finite number, NaN or None.
        """
        if not completions:
            return Rewards([], [[] for _ in self.functions], [Failures() for _ in self.functions])
        names = dict.fromkeys(name for line in columns for name in line)
        lists: dict[str, list[Any]] = {name: [line.get(name) for line in columns] for name in names}
        lists |= {"prompts": list(prompts), "completions": list(completions), "completion_ids": list(completion_ids)}
        failures = [Failures() for _ in self.functions]
        pending = [self._begin(function, lists) for function in self.functions]
        by_function: list[list[float | None]] = [[] for _ in self.functions]
        # The plain ones first: they run while the asynchronous ones wait.
        for at in sorted(range(len(self.functions)), key=lambda at: pending[at] is not None):
            by_function[at] = self._of_function(at, lists, pending[at], failures[at])
            if failures[at].count == len(completions) and not self._worked[at]:
                raise ToolkitError(f"{failures[at].first}; it has not worked for any completion yet.")
            self._worked[at] |= failures[at].count < len(completions)
        assert self.weights is not None
        totals = []
        for row in zip(*by_function):
            applies = [weight * value for weight, value in zip(self.weights, row) if value is not None]
            totals.append(sum(applies) if applies else math.nan)
        known = [[math.nan if value is None else value for value in values] for values in by_function]
        return Rewards(totals, known, failures)

    def open_models(self, recipe: "Recipe", device: "torch.device") -> None:
        """Load the reward models among the functions."""
        for function in self.functions:
            if isinstance(function, RewardModelFunction):
                function.open(recipe, device)

    def take_logged(self) -> dict[str, list[float]]:
        """What functions gave to ``log_metric`` since the last call."""
        taken, self.logged = self.logged, {}
        return taken

    def _log_metric(self, name: str, value: float) -> None:
        self.logged.setdefault(name, []).append(float(value))

    def _arguments(self, lists: Mapping[str, list[Any]]) -> dict[str, Any]:
        others = {"trainer_state": self.trainer_state, "log_metric": self._log_metric, "log_extra": lambda *_: None}
        return {**lists, **others}

    def _begin(self, function: RewardFunction, lists: Mapping[str, list[Any]]) -> "Future[Any] | None":
        """An asynchronous function's call, which has begun."""
        if not is_async(function):
            return None
        return LOOP.submit(awaited_within(self.timeout, function(**self._arguments(lists))))

    def _called(self, function: RewardFunction, lists: Mapping[str, list[Any]], pending: "Future[Any] | None") -> Any:
        if pending is None:
            arguments = self._arguments(lists)
            if self.timeout is None:
                value = function(**arguments)
            else:
                value = timed_call(lambda: function(**arguments), self.timeout)
            if not inspect.isawaitable(value):
                return value
            pending = LOOP.submit(awaited_within(self.timeout, value))
        return pending.result()

    def _of_function(
        self,
        index: int,
        lists: Mapping[str, list[Any]],
        pending: "Future[Any] | None",
        failures: Failures,
    ) -> list[float | None]:
        """A function's value of each completion: None where it does not apply, NaN where it failed."""
        function, completions = self.functions[index], lists["completions"]
        where = f"the reward function {self.names[index]}"
        try:
            with call_checked(where, "a step's completions", passing=(TookTooLong,)):
                returned = self._called(function, lists, pending)
        except TookTooLong:
            late = f"{where} must return within objective.reward_timeout, which is {self.timeout:g} seconds"
            return [failures.add(late) for _ in completions]
        except ToolkitError as error:
            if len(completions) == 1:
                return [failures.add(str(error).rstrip("."))]
            alone = [{name: [values[at]] for name, values in lists.items()} for at in range(len(completions))]
            begun = [self._begin(function, one) for one in alone]
            return [value for one, call in zip(alone, begun) for value in self._of_function(index, one, call, failures)]
        return self._checked(where, returned, completions, failures)

    @staticmethod
    def _checked(where: str, returned: Any, completions: Sequence[Any], failures: Failures) -> list[float | None]:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else type(values).__name__
            raise ToolkitError(
                f"{where} must return a list with a number for each of {len(completions)} completions, got {got}."
            )
        found: list[float | None] = []
        for value, completion in zip(values, completions):
            if isinstance(value, (Exception, SystemExit)):  # of a function that is called for each completion
                found.append(failures.add(f"{where} raised {type(value).__name__}: {first_line(value)}"))
                continue
            reward = None if value is None else finite_reward(value, where, completion)
            if reward is not None and math.isnan(reward):
                reward = failures.add(f"{where} returned NaN")
            found.append(reward)
        return found


def _distinct(names: Sequence[str]) -> list[str]:
    """Names, of which later ones that were there already have a number: metrics are by name."""
    found: list[str] = []
    for name in names:
        others = (f"{name}_{number}" for number in count(2))
        found.append(name if name not in found else next(other for other in others if other not in found))
    return found
