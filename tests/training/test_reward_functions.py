"""Reward functions with TRL's signature: what they are called with, what they may return, what is an error."""

import math
import re
from typing import Any

import pytest

from toolkit.errors import ToolkitError
from toolkit.training.reward_functions import RewardFunctions, load_reward_functions

HERE = "tests.training.test_reward_functions"
PROMPTS, COMPLETIONS, IDS = ["a", "a", "b"], ["x", "yy", ""], [[1], [2, 2], []]
COLUMNS = [{"target": 1}, {"target": 1}, {"target": 2, "hint": "h"}]


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(one)) for one in completions]


async def by_name(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], target: list[int],
    hint: list[str | None], trainer_state: Any,
) -> list[float | None]:  # fmt: skip
    assert (prompts, completions, completion_ids, trainer_state) == (PROMPTS, COMPLETIONS, IDS, None)
    assert (target, hint) == ([1, 1, 2], [None, None, "h"])
    return [None, 10.0, None]


def nothing(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def too_few(**_: Any) -> list[float]:
    return [1.0]


def endless(completions: list[str], **_: Any) -> list[float]:
    return [math.inf] * len(completions)


def broken(**_: Any) -> list[float]:
    raise KeyError("target")


def rewards(*names: str, weights: list[float] | None = None) -> Any:
    return RewardFunctions([f"{HERE}:{name}" for name in names], weights)(PROMPTS, COMPLETIONS, IDS, COLUMNS)


def test_weights_and_missing_rewards() -> None:
    found = rewards("length", "by_name", weights=[2.0, 0.5])
    assert found.totals == [2.0, 9.0, 0.0]
    assert [math.isnan(value) for value in found.by_function[1]] == [True, False, True]
    assert all(map(math.isnan, rewards("nothing").totals))
    assert RewardFunctions([f"{HERE}:length", "x.y:length"][:1]).labels == ["length"]
    assert RewardFunctions([f"{HERE}:length"])([], [], [], []).totals == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", "must return a list with a number for each of 3 completions, got 1 of them."),
        ("endless", "must be a finite number, or None where it does not apply, got inf"),
        ("broken", "raised KeyError at .*test_reward_functions.py:[0-9]+ for a step's completions: 'target'"),
    ],
)
def test_errors_name_the_function(name: str, said: str) -> None:
    with pytest.raises(ToolkitError, match=f"^the reward function {name} {said if '.*' in said else re.escape(said)}"):
        rewards(name)


@pytest.mark.parametrize("name", ["tests.nowhere:f", f"{HERE}:nowhere", f"{HERE}:PROMPTS"])
def test_what_is_no_function(name: str) -> None:
    with pytest.raises(ToolkitError, match=r"^objective\.reward_funcs\[0\] must be a function"):
        load_reward_functions([name])
