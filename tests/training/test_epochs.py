"""``train.num_train_epochs``: the steps that it comes to are those that take the lines so often."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.objective_recipes import objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer, train
from toolkit.training.report import read_metrics


def recipe_of(tmp_path: Path, kind: str, lines: list[dict[str, Any]], train: dict[str, Any], **sections: Any) -> Any:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {
        "task": None,
        "data_files": str(path),
        "evaluation": {"val_set_size": 1e-9},
        **sections.pop("objective", {}),
    }
    return objective_recipe(tmp_path, kind, given, train=train, tokenizer={"vocab_size": 300}, **sections)


SFT = [{"prompt": "a" * (1 + at % 5), "completion": " b" * (1 + at * 7 % 11)} for at in range(23)]
PAIRS = [{"prompt": f"p{at}", "chosen": " a", "rejected": " b c"} for at in range(11)]


@pytest.mark.parametrize(("epochs", "accumulated"), [(1.0, 1), (2.5, 1), (3.0, 2)])
def test_packed_lines_are_taken_as_often(epochs: float, accumulated: int, tmp_path: Path) -> None:
    sizes = {"num_train_epochs": epochs, "batch_tokens": 48, "gradient_accumulation_steps": accumulated}
    trainer = Trainer(recipe_of(tmp_path, "sft", SFT, sizes), quiet=True)
    objective, steps = trainer.objective, trainer.recipe.train.max_steps
    asked = int(epochs), round(epochs % 1 * len(SFT))
    for step in range(steps):
        position = objective.state_dict()
        assert (position["epoch"], position["done"]) < asked, step
        next(objective.updates(step))
    position = objective.state_dict()
    assert (position["epoch"], position["done"]) >= asked


def test_pairs_are_taken_as_often(tmp_path: Path) -> None:
    trainer = Trainer(recipe_of(tmp_path, "orpo", PAIRS, {"num_train_epochs": 3.0}, objective={"pairs": 4}), quiet=True)
    assert trainer.recipe.train.max_steps == 9  # 33 pairs


def test_a_run_of_epochs_ends_and_its_schedule_with_it(tmp_path: Path) -> None:
    schedule = {"lr_scheduler_type": "linear", "warmup_ratio": 0.5, "warmup_steps": 0}
    recipe = recipe_of(tmp_path, "orpo", PAIRS, {"num_train_epochs": 1.0}, objective={"pairs": 4}, schedule=schedule)
    assert train(recipe, quiet=True)["global_step"] == 3
    folder = tmp_path / "runs" / "orpo"
    rates = [line["learning_rate"] for line in read_metrics(folder / "metrics.jsonl")]
    assert rates == pytest.approx([0.0, 0.5 * recipe.optimizer.learning_rate, recipe.optimizer.learning_rate])
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["max_steps"] == 3
    more = recipe.model_copy(
        update={"resume_from_checkpoint": True, "train": recipe.train.model_copy(update={"num_train_epochs": 2.0})}
    )
    assert train(more, quiet=True)["global_step"] == 6


def test_what_has_no_epochs_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=r"num_train_epochs must be null without objective\.data_files and"):
        objective_recipe(tmp_path, "sft", {}, train={"num_train_epochs": 1.0})
    few = {"max_check_samples": 3}
    with pytest.raises(ToolkitError, match=r"max_check_samples must be null with train\.num_train_epochs"):
        Trainer(recipe_of(tmp_path, "sft", SFT, {"num_train_epochs": 1.0}, objective=few), quiet=True)
    schedule = {"warmup_steps": 10}
    with pytest.raises(ToolkitError, match=r"must be <= train\.max_steps, which is 3, got 10; that is train\.num"):
        Trainer(
            recipe_of(tmp_path, "orpo", PAIRS, {"num_train_epochs": 1.0}, objective={"pairs": 4}, schedule=schedule),
            quiet=True,
        )
