"""Run by test_objectives_of_two_processes.py under torchrun: two processes train one kind of objective together."""

import sys
from pathlib import Path
from typing import Any

from tests.helpers.objective_recipes import LOWER, objective_recipe
from tests.helpers.processes import end_with_same_weights
from toolkit.config import Recipe

FIELDS: dict[str, dict[str, Any]] = {
    "prm": {"lines": 4},
    "sdft": {"prompts": 4, "num_generations": 2, "distillation_topk": 5, "teacher_model_kind": "live"},
    "reinforce_plus_plus": {"prompts": 4, "num_generations": 2},
}


def recipe_of(folder: Path, kind: str, run_name: str) -> Recipe:
    train = {"max_steps": 2, "batch_tokens": 48}
    return objective_recipe(folder, kind, {"task": LOWER, **FIELDS[kind]}, run_name=run_name, train=train)


if __name__ == "__main__":
    end_with_same_weights(recipe_of(Path(sys.argv[1]), sys.argv[2], "two"))
