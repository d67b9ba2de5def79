"""Tasks of reasoning-gym by name: problems by seed, its own scores, what is said without the package.

The package is an extra with a dozen dependencies; a module with its interface stands in for it here, and
``tests/soak/test_reasoning_gym_package.py`` runs the same with the package.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.objective_recipes import objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer
from toolkit.training.tasks import checked_reward, make_task
from toolkit.training.tasks.base import ProblemStream


@dataclass
class SumsConfig:
    seed: int
    size: int
    largest: int = 9


class Additions:
    def __init__(self, config: SumsConfig) -> None:
        self.config = config
        if config.largest < 1:
            raise AssertionError("largest must be positive")

    def __getitem__(self, at: int) -> dict[str, Any]:
        rng = random.Random(self.config.seed + at)
        a, b = rng.randint(0, self.config.largest), rng.randint(0, self.config.largest)
        return {"question": f"{a} + {b} = ", "answer": str(a + b), "metadata": {"a": a}}

    def score_answer(self, given: str | None, entry: dict[str, Any]) -> float:
        if given is None:
            return 0.0
        return 1.0 if int(given) == int(entry["answer"]) else 0.01


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"sums": (Additions, SumsConfig)}  # type: ignore[attr-defined]
    module.factory = factory  # type: ignore[attr-defined]
    module.create_dataset = lambda name, **fields: Additions(SumsConfig(**fields))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


@pytest.mark.usefixtures("package")
def test_problems_and_scores_are_the_dataset_s() -> None:
    task = make_task({"name": "reasoning_gym:sums", "config": {"largest": 3}})
    problems = task.make(2**40 + 5, 20)
    assert problems == task.make(2**40 + 5, 20)
    assert problems != task.make(6, 20)
    for at, problem in enumerate(problems):
        a, _, b, _ = problem.key.split()
        assert (problem.prompt, problem.entry["metadata"]) == (f"{a} + {b} = \n", {"a": int(a)})
        assert problem.solution == f"<answer>{int(a) + int(b)}</answer>"
        assert problem.wrong == problems[at - 1].solution
        assert checked_reward(task, problem, f"I think <answer>7</answer> no {problem.solution}.") == 1.0
        assert checked_reward(task, problem, "<answer>99</answer>") == 0.01
        assert checked_reward(task, problem, problem.solution.removesuffix("</answer>")) == 0.0
        lost = checked_reward(task, problem, "<answer>seven</answer>")
        assert lost != lost  # the scorer raises
    whole = make_task({"name": "reasoning_gym:sums", "tag": None, "template": "Q: {question}"})
    (problem,) = whole.make(1, 1)
    assert problem.prompt == f"Q: {problem.key}"
    assert checked_reward(whole, problem, f" {problem.solution}\n") == 1.0
    stream = ProblemStream(task, 0, 0.5, held_out=True)
    assert not {one.key for one in stream.take(50)} & {one.key for one in ProblemStream(task, 0, 0.5).take(50)}


@pytest.mark.usefixtures("package")
def test_a_step_of_grpo(tmp_path: Path) -> None:
    task = {"name": "reasoning_gym:sums", "tag": None, "template": "{question}"}
    recipe = objective_recipe(tmp_path, "grpo", {"task": task, "prompts": 2, "num_generations": 4})
    trainer = Trainer(recipe, quiet=True)
    trainer.train_step()
    assert 0.0 < trainer.objective.finish()[1]["unscored_fraction"] <= 1.0


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "reasoning_gym:sum"}, "such as reasoning_gym:sums, got 'reasoning_gym:sum'"),
        ({"name": "reasoning_gym:sums", "config": {"x": 1}}, "objective.task.config must have fields of the dataset"),
        ({"name": "reasoning_gym:sums", "config": {"largest": 0}}, r"\(largest must be positive\)"),
        ({"name": "reasoning_gym:sums", "template": "?"}, r"objective.task.template must have \{question\}, got '\?'"),
        ({"name": "countdown:x"}, "objective.task.name must be a class to import"),
    ],
)
def test_what_does_not_fit(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolkitError, match=said):
        make_task(fields)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        ToolkitError, match=r"'reasoning_gym:sums' needs the package 'reasoning-gym': pip install train-infer-tool"
    ):
        make_task({"name": "reasoning_gym:sums"})
