"""The moving average of weights: its definition, what it is used for, and that a run with it resumes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.objective_recipes import objective_recipe, resumed, weights
from toolkit.loading import find_source
from toolkit.training.averaging import FILE
from toolkit.training.loop import Trainer


@pytest.mark.sweep
def test_the_average_of_every_step(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "dpo", {"pairs": 4}, train={"ema_decay": 0.75, "max_steps": 3})
    trainer = Trainer(recipe, quiet=True)
    assert trainer.averaged is not None
    exact = weights(trainer)
    step = trainer.train_step

    def train_step() -> tuple[float, float]:
        done = step()
        for name, tensor in weights(trainer).items():
            exact[name] = 0.75 * exact[name] + 0.25 * tensor
        return done

    trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.fit()
    last = weights(trainer)
    with trainer.averaged.applied():
        inside = weights(trainer)
    for name, tensor in exact.items():
        assert torch.allclose(inside[name], tensor, atol=1e-6)
        assert torch.equal(weights(trainer)[name], last[name])
    assert any(not torch.equal(inside[name], last[name]) for name in last)
    written = load_file(str(find_source(tmp_path / "runs" / "dpo" / "ema").folder / "model.safetensors"))
    assert all(torch.equal(written[name], inside[name]) for name in written)


@pytest.mark.sweep
def test_resuming_is_exact(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "sft", {}, train={"ema_decay": 0.9})
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    again = resumed(recipe.model_copy(update={"run_name": "again"}))
    assert again.averaged is not None
    files = [
        load_file(str(tmp_path / "runs" / name / "checkpoints" / "step-000004" / "training" / FILE))
        for name in ("sft", "again")
    ]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
