"""``objective.rollout.engine``: another engine rolls out for a recipe."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, objective_recipe, weights
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer
from toolkit.training.rollout import Rollout


def trained(folder, engine):
    rollout = {"max_completion_length": 8, "max_num_seqs": 16, "engine": engine}
    objective = {"task": LOWER, "prompts": 4, "num_generations": 4, "rollout": rollout}
    trainer = Trainer(objective_recipe(folder, "grpo", objective, train={"max_steps": 2}), quiet=True)
    trainer.fit()
    return weights(trainer)


@pytest.mark.sweep
def test_the_named_engine_rolls_out_with_its_arguments(tmp_path, monkeypatch):
    import toolkit

    made = []

    class Elsewhere(toolkit.Engine):
        def __init__(self, *arguments, **given):
            made.append(given)
            super().__init__(*arguments, **given)

    monkeypatch.setattr("tests.helpers.objective_recipes.Elsewhere", Elsewhere, raising=False)
    name = "tests.helpers.objective_recipes:Elsewhere"
    other = trained(tmp_path / "other", {"name": name, "max_num_seqs": 3, "block_size": 8})
    assert {(one["max_num_seqs"], one["block_size"], one["max_model_len"]) for one in made} == {(3, 8, 32)}
    own = trained(tmp_path / "own", None)
    assert all(torch.equal(one, other[key]) for key, one in own.items())


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"num_workers": 2}, "objective.rollout.engine.name must be a class to import, such as infer_patches.ray:"),
        pytest.param(
            {"name": 3}, "objective.rollout.engine.name must be a class to import, such as", marks=pytest.mark.sweep
        ),
        pytest.param(
            {"name": "nowhere:Engine"},
            "objective.rollout.engine.name must be a class to import, got 'nowhere:Engine'",
            marks=pytest.mark.sweep,
        ),
    ],
)
def test_a_wrong_name_is_one_sentence(engine, words, tmp_path):
    with pytest.raises(ToolkitError, match=words):
        trained(tmp_path, engine)


def test_conversations_are_refused(tmp_path):
    recipe = objective_recipe(tmp_path, "grpo", {"rollout": {"max_completion_length": 8, "engine": {"name": "a:B"}}})
    words = r"objective\.rollout\.engine must be null with conversations of several turns, got 'a:B'\."
    with pytest.raises(ToolkitError, match=words):
        Rollout(SimpleNamespace(), recipe.objective.rollout).converse(None, [], [], 1)
