"""Reward functions as TRL has them: called once for all completions of a step, by name, with the lines' columns."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from toolkit.errors import ToolkitError
from toolkit.training.tasks.base import call_checked, finite_reward, imported

RewardFunction = Callable[..., Any]


class Rewards(NamedTuple):
    """Of each completion the weighted sum, NaN where no function judges it, and what each function returned."""

    totals: list[float]
    by_function: list[list[float]]


def load_reward_functions(names: Sequence[str]) -> list[RewardFunction]:
    """The functions of ``objective.reward_funcs``. Raises ToolkitError for one that cannot be imported or called."""
    found: list[RewardFunction] = []
    for at, name in enumerate(names):
        function = imported(name, f"objective.reward_funcs[{at}]", "a function")
        if not callable(function):
            raise ToolkitError(f"objective.reward_funcs[{at}] must be a function, got '{name}'.")
        found.append(function)
    return found


class RewardFunctions:
    """The functions of a recipe with their weights.

    Args:
        names: ``module:function`` of each.
        weights: of each; None is 1 each.

    Attributes:
        labels: short names, which metrics have: the functions', with their module where two are the same.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float] | None = None) -> None:
        self._functions = load_reward_functions(names)
        self._weights = [1.0] * len(names) if weights is None else list(weights)
        short = [name.partition(":")[2] for name in names]
        self.labels = [one if short.count(one) == 1 else name for one, name in zip(short, names)]

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
            ToolkitError: a function raised, or returned other than a finite number, NaN or None for each completion.
        """
        if not completions:
            return Rewards([], [[] for _ in self._functions])
        names = dict.fromkeys(name for line in columns for name in line)
        given = {name: [line.get(name) for line in columns] for name in names}
        given |= {"prompts": list(prompts), "completions": list(completions), "completion_ids": list(completion_ids)}
        returned = asyncio.run(self._called({**given, "trainer_state": None}))
        by_function = [
            self._checked(label, values, completions) for label, values in zip(self.labels, returned, strict=True)
        ]
        totals = []
        for values in zip(*by_function):
            judged = [weight * value for weight, value in zip(self._weights, values) if not math.isnan(value)]
            totals.append(sum(judged) if judged else math.nan)
        return Rewards(totals, by_function)

    async def _called(self, given: Mapping[str, Any]) -> list[Any]:
        """What each function returned; asynchronous ones wait together."""

        async def one(label: str, function: RewardFunction) -> Any:
            with call_checked(f"the reward function {label}", "a step's completions"):
                value = function(**given)
                return await value if inspect.isawaitable(value) else value

        return await asyncio.gather(*map(one, self.labels, self._functions))

    @staticmethod
    def _checked(label: str, returned: Any, completions: Sequence[Any]) -> list[float]:
        where = f"the reward function {label}"
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else type(values).__name__
            raise ToolkitError(
                f"{where} must return a list with a number for each of {len(completions)} completions, got {got}."
            )
        return [finite_reward(value, where, completion) for value, completion in zip(values, completions)]
