"""Held-out measures between steps: the best checkpoint, early stopping, and a run that resumes with both."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.objective_recipes import LOWER, check_resumes, objective_recipe
from toolkit.config import validate
from toolkit.config.outputs import EvaluateSection
from toolkit.errors import ToolkitError
from toolkit.loading import find_source
from toolkit.loading.run import BEST, latest, name_of, served
from toolkit.training.best import Measures
from toolkit.training.loop import Trainer, train
from toolkit.training.metrics import read_metrics


def measures(**fields: Any) -> Measures:
    return Measures(EvaluateSection(eval_steps=2, **fields), "eval_loss")


def test_the_best_is_kept_and_patience_ends() -> None:
    found = measures(load_best_model_at_end=True, early_stopping_patience=2, early_stopping_threshold=0.1)
    assert [found.due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    values = [3.0, 2.0, 1.95, 2.5]
    assert [found.add(2 * at, {"eval_loss": value}) for at, value in enumerate(values, 1)] == [True, True, True, False]
    assert found.best_step == 6  # better by less than the threshold: the best, but no reason to continue
    assert found.stopped
    again = measures(load_best_model_at_end=True, early_stopping_patience=2, early_stopping_threshold=0.1)
    again.load_state_dict(found.state_dict())
    assert again.stopped
    assert again.describe() == found.describe() == "eval_loss 1.9500 at step 6"
    assert [again.owed(step) for step in (8, 9, 10)] == [False, False, True]


def test_which_direction_is_better() -> None:
    more = measures(metric_for_best_model="rewards/accuracies", early_stopping_patience=3)
    assert [more.add(at, {"eval_rewards/accuracies": value}) for at, value in ((2, 0.5), (4, 0.4), (6, 0.6))] == [
        True, False, True,
    ]  # fmt: skip
    less = measures(metric_for_best_model="eval_x", greater_is_better=False, early_stopping_patience=3)
    assert [less.add(at, {"eval_x": value}) for at, value in ((2, 0.5), (4, math.nan), (6, 0.4))] == [True, False, True]
    with pytest.raises(ToolkitError, match=r"must be a metric of the evaluation, got 'eval_x'; there are eval_loss\."):
        less.add(8, {"eval_loss": 1.0})


def test_what_needs_measures_says_so(tmp_path: Path) -> None:
    values = objective_recipe(tmp_path, "sft", {}).model_dump()
    for field in ({"load_best_model_at_end": True}, {"early_stopping_patience": 1}):
        with pytest.raises(ToolkitError, match=r"^evaluate\.eval_steps must be given"):
            validate({**values, "evaluate": field})


@pytest.mark.sweep
def test_a_run_ends_with_its_best_model(tmp_path: Path) -> None:
    recipe = objective_recipe(
        tmp_path, "sft", {"task": None, "data_files": str(_file(tmp_path))},
        train={"max_steps": 12}, optimizer={"learning_rate": 0.5}, checkpoint={"save_steps": None},
        evaluate={"do_eval": True, "eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 1},
    )  # fmt: skip
    result = train(recipe, quiet=True)
    folder = tmp_path / "runs" / "sft"
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["eval_loss"] for line in lines]
    best = losses.index(min(losses)) + 1
    assert result["best_step"] == best
    assert result["global_step"] == len(losses) == best + 1 < 12
    assert result["eval_loss"] == pytest.approx(min(losses), abs=1e-9)
    opened, last = served(folder / "checkpoints"), latest(folder / "checkpoints")
    assert opened is not None
    assert last is not None
    assert (opened.name, last.name) == (name_of(best), name_of(best + 1))
    assert find_source(folder).folder == opened


@pytest.mark.sweep
def test_resuming_knows_the_best(tmp_path: Path) -> None:
    recipe = objective_recipe(
        tmp_path, "sft", {"task": LOWER}, train={"max_steps": 5}, checkpoint={"save_steps": 2},
        evaluate={"do_eval": True, "eval_steps": 2, "load_best_model_at_end": True},
    )  # fmt: skip
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    again = check_resumes(whole, recipe)
    assert again.measures.best_step == whole.measures.best_step
    pointers = [(tmp_path / "runs" / name / "checkpoints" / BEST).read_text() for name in ("sft", "again")]
    assert pointers[0] == pointers[1]


def _file(folder: Path) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("".join(f'{{"prompt": "{at} ", "completion": "{at % 7} a"}}\n' for at in range(60)))
    return path
