"""reasoning-gym itself: problems, solutions and scores of some of its datasets."""

import math

import pytest

from toolkit.training.tasks import checked_reward, make_task

pytestmark = pytest.mark.soak
DATASETS = [
    "basic_arithmetic",
    "chain_sum",
    "gcd",
    "leg_counting",
    "spell_backward",
    "countdown",
    "mini_sudoku",
    "syllogism",
]


@pytest.mark.parametrize("name", DATASETS)
def test_solutions_score_one_and_no_text_raises(name: str) -> None:
    pytest.importorskip("reasoning_gym", reason="needs the package reasoning-gym: pip install reasoning-gym")
    task = make_task({"name": f"reasoning_gym:{name}"})
    problems = task.make(3, 12)
    assert [one.prompt for one in problems] == [one.prompt for one in task.make(3, 12)]
    assert len({one.prompt for one in problems}) > 1
    for problem in problems:
        assert checked_reward(task, problem, f"So {problem.solution}") == 1.0
        for text in (
            "",
            "no tag",
            "<answer>",
            "<answer></answer>",
            "<answer>\x00é</answer>",
            "<answer>[1, (]</answer>",
        ):
            value = checked_reward(task, problem, text)
            assert math.isnan(value) or 0.0 <= value < 1.0
