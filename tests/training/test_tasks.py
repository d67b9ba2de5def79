"""Tasks: problems by seed, a split that holds, and a reward that no text can fool or crash."""

import fractions
import itertools
import math
import random
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import ToolkitError
from toolkit.training.tasks import Problem, ProblemStream, Task, checked_reward, make_task
from toolkit.training.tasks.countdown import evaluate

PROMPT = "3 5 2 > 13 :"


@pytest.mark.parametrize("numbers", [2, 3, 4, 6])
def test_solutions_are_right_and_wrong_completions_wrong(numbers: int) -> None:
    task = make_task({"name": "countdown", "numbers": numbers, "largest": 12})
    problems = task.make(5, 300)
    assert problems == task.make(5, 300)
    assert problems != task.make(6, 300)
    for problem in problems:
        assert task.reward(problem.prompt, problem.solution) == 1.0
        assert task.reward(problem.prompt, problem.wrong) == 0.0
        assert eval(problem.solution) == int(problem.prompt.split(">")[1].strip(" :"))


@pytest.mark.parametrize(
    "text",
    ["3*5-2", " 3*5-2", "5*3-2\n", "(3*5)-2", "3 * 5 - 2", "((3)*(5)-((2)))", "5*3-2 ", "3*(5)-2"],
)
def test_right(text: str) -> None:
    assert make_task({"name": "countdown"}).reward(PROMPT, text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "13", "3+5*2-0", "3*5-1-1", "5+5+3", "3*5-2=13", "3*5--2", "+3*5-2", "-2+3*5", "3*5-2;", "3*5-2 x",
        "(3*5-2", "3*5-2)", "()", "3**5", "3//5", "__import__('os')", "3*5-2\x00", "٣*5-2", "3*5-²", "3 5-2", "1_3",
        "0x3*5-2", "3.0*5-2", "9" * 5000, "(" * 5000, "3*" * 90 + "3", "9999999999-9999999986",
        "*".join(["999999999"] * 9),
        "3*5-2" + " " * 300 + "+0", "3*5-2+3-3", "\u202e3*5-2",
    ],
)  # fmt: skip
def test_garbage_reuse_foreign_numbers_and_overflow_are_wrong(text: str) -> None:
    begun = time.perf_counter()
    assert make_task({"name": "countdown"}).reward(PROMPT, text) == 0.0
    assert time.perf_counter() - begun < 0.1


def test_not_every_number_must_be_used_and_none_twice() -> None:
    task = make_task({"name": "countdown"})
    assert task.reward("3 5 2 > 15 :", "3*5") == 1.0
    assert task.reward("3 5 2 > 9 :", "3*3") == 0.0
    assert task.reward("3 3 2 > 9 :", "3*3") == 1.0


@pytest.mark.parametrize("prompt", ["", ">", ":", "3 5", "a b > 3 :", "3 5 > x :", "3 5 2 > 13", "> 13 :"])
def test_a_prompt_that_is_none_has_no_solution(prompt: str) -> None:
    assert make_task({"name": "countdown"}).reward(prompt, "3*5-2") == 0.0


@given(st.text(alphabet="0123456789+-*() x", max_size=30))
def test_the_parser_agrees_with_python(text: str) -> None:
    try:
        value, _ = evaluate(text)
    except ValueError:
        return
    # Python refuses leading zeros, which mean nothing here.
    assert value == eval(re.sub(r"\d+", lambda match: str(int(match[0])), text).strip())


def test_held_out_problems_are_never_trained_on() -> None:
    task = make_task({"name": "countdown", "numbers": 3, "largest": 6})
    held_out = {problem.key for problem in ProblemStream(task, 0, 0.2, held_out=True).take(400)}
    for seed in range(3):
        train = {problem.key for problem in ProblemStream(task, seed, 0.2).take(1000)}
        assert not train & held_out
    assert len(held_out) > 50
    shown = {"3 5 2 > 13": "[2, 3, 5] 13"}  # one problem in any order of its numbers
    made = {problem.prompt.removesuffix(" :"): problem.key for problem in task.make(1, 3000)}
    for prompt, key in shown.items():
        numbers, target = prompt.split(" > ")
        for order in itertools.permutations(numbers.split()):
            assert made.get(f"{' '.join(order)} > {target}", key) == key


def test_a_stream_goes_on_where_it_was_and_ranks_share_it() -> None:
    task = make_task({"name": "countdown"})
    stream = ProblemStream(task, 3, 0.1)
    whole = stream.take(700)
    for at in (0, 1, 255, 256, 400, 699):
        before = ProblemStream(task, 3, 0.1)
        before.take(at)
        after = ProblemStream(task, 3, 0.1)
        after.load_state_dict(before.state_dict())
        assert after.take(700 - at) == whole[at:]
    ranks = [ProblemStream(task, 3, 0.1, rank=rank, world_size=2).take(200) for rank in range(2)]
    assert ranks[0][:100] == whole[0:200:2]
    assert ranks[1][:100] == whole[1:200:2]


KNOWN = "objective.task.name must be one of countdown, guess_number, hinted, reasoning_gym, package.module:Class"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"name": "countdwn"},
            f"{KNOWN}, got 'countdwn'; did you",
        ),
        (
            {},
            f"{KNOWN}, got None",
        ),
        ({"name": "countdown", "numbers": 1}, "objective.task.numbers must be a whole number from 2 to 6, got 1."),
        ({"name": "countdown", "largest": "9"}, "objective.task.largest must be a whole number from 2 to 99, got '9'."),
        (
            {"name": "countdown", "target": 10**6},
            "objective.task.target must be a whole number from 10 to 999, got 1000000.",
        ),
        (
            {"name": "countdown", "colour": 1},
            "objective.task must have the fields of 'countdown', got {'name': 'countdown', 'colour': 1} (",
        ),
        ({"name": "nowhere:Task"}, "objective.task.name must be a class to import, got 'nowhere:Task' ("),
        ({"name": "random:Nothing"}, "objective.task.name must be a class to import, got 'random:Nothing' ("),
        ({"name": "random:Random"}, "objective.task.name must be a class derived from Task, got 'random:Random'."),
    ],
)
def test_a_wrong_task_is_one_sentence(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        make_task(fields)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_task_of_ones_own() -> None:
    task = make_task({"name": "toolkit.training.tasks.countdown:Countdown", "numbers": 2})
    assert task.make(random.Random(0).randrange(9), 1)[0].prompt.count(" ") == 4


class Judge(Task):
    """A task whose reward is given."""

    def __init__(self, reward: object) -> None:
        self._reward = reward

    def make(self, seed: int, count: int) -> list[Problem]:
        return []

    def reward(self, prompt: str, completion: str) -> float | None:
        return self._reward(completion) if callable(self._reward) else self._reward  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (2, 2.0),
        (np.float32(0.5), 0.5),
        (np.array([0.25]), 0.25),
        (torch.tensor([0.75]), 0.75),
        (fractions.Fraction(1, 8), 0.125),
        (None, math.nan),
        (float("nan"), math.nan),
    ],
)
def test_a_reward_is_any_number_or_none(value: object, expected: float) -> None:
    got = checked_reward(Judge(value), "p", "c")
    assert type(got) is float
    assert got == expected or (math.isnan(got) and math.isnan(expected))


class Unprintable:
    def __repr__(self) -> str:
        raise KeyError("no")

    @property
    def item(self) -> object:
        raise KeyError("no")


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        -math.inf,
        np.float64("inf"),
        1e300,
        10**400,
        "1.0",
        b"1",
        [1.0, 2.0],
        torch.ones(2),
        {},
        lambda completion: 10**5000,
        [0.0] * 10_000,
        Unprintable(),
    ],
)
def test_a_reward_that_is_none_of_these_is_one_sentence(value: object) -> None:
    with pytest.raises(ToolkitError) as caught:
        checked_reward(Judge(value), "p", "a completion")
    assert len(str(caught.value)) < 400
    assert re.match(
        r"the reward of the task Judge must be a finite number, or None where it does not apply, got .* for the "
        r"completion 'a completion'\.$",
        str(caught.value),
        re.DOTALL,
    )


def test_a_reward_that_raises_says_where() -> None:
    with pytest.raises(
        ToolkitError, match=r"the task Judge raised ZeroDivisionError at .*test_tasks.py:\d+ for the completion 'abc': "
    ) as caught:
        checked_reward(Judge(lambda completion: 1 / (len(completion) - 3)), "p", "abc")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_hints_stand_in_a_share_of_the_prompts() -> None:
    inner = {"name": "countdown", "numbers": 2, "largest": 9}
    task, plain = make_task({"name": "hinted", "task": inner, "share": 0.25}), make_task(inner)
    problems = list(zip(task.make(3, 2000), plain.make(3, 2000), strict=True))
    hinted = [(one, other) for one, other in problems if one.prompt != other.prompt]
    assert len(hinted) / 2000 == pytest.approx(0.25, abs=0.05)
    for one, other in hinted:
        assert one.prompt == f"{other.solution.strip()} {other.prompt}"
        assert (one.solution, one.key) == (other.solution, other.key)
    for one, other in problems[:50]:
        assert task.judge(one, other.solution) == plain.judge(other, other.solution) == 1.0
        assert task.judge(one, other.wrong) == plain.judge(other, other.wrong)
    with pytest.raises(ToolkitError, match=r"objective\.task\.share must be >= 0 and <= 1, got 2"):
        make_task({"name": "hinted", "task": inner, "share": 2})
