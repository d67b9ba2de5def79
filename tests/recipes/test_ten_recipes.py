"""The recipes of this folder: each learns, resumes bit for bit after SIGKILL, and has the losses of TRL's trainer."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.recipe_data import write_base, write_data
from tests.helpers.recipe_runs import RECIPES, VARIANTS, in_process
from toolkit.loading.run import latest

# The held-out metric of each recipe, and whether more is better.
METRICS = {
    "sft_chat": ("eval_loss", False),
    "completion": ("eval_loss", False),
    "pretrain_streaming": ("eval_loss", False),
    "lora": ("eval_loss", False),
    "qlora": ("eval_loss", False),
    "dpo": ("eval_rewards/accuracies", True),
    "kto": ("eval_rewards/accuracies", True),
    "orpo": ("eval_logps/accuracies", True),
    "reward_model": ("eval_accuracy", True),
    "grpo": ("eval_reward", True),
    "rloo": ("eval_reward", True),
    "gkd": ("eval_divergence", False),
    "sdft": ("eval_divergence", False),
    "prm": ("eval_accuracy", True),
    "reinforce_plus_plus": ("eval_reward", True),
}


WITHOUT_TRL = ("reinforce_plus_plus",)
"""Recipes that TRL has no trainer for."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_base(folder / "base")
    write_base(folder / "teacher", seed=1)
    write_data(folder)
    return folder


def test_every_recipe_is_here() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted(METRICS)


@pytest.mark.sweep
@pytest.mark.parametrize("name", METRICS)
def test_a_recipe_as_users_write_it(name: str, data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).symlink_to(file)

    def run(phase: str, status: int = 0) -> Any:
        assert in_process(phase, name, tmp_path) == status, phase
        return None if status else json.loads((tmp_path / f"{name}-{phase}.json").read_text())

    whole = run("whole")
    metric, more = METRICS[name]
    before, after = whole["before"][metric], whole["after"][metric]
    assert math.isfinite(after)
    assert (after > before) if more else (after < before), (before, after)

    run("killed", -signal.SIGKILL)
    resumed = run("resumed")
    assert resumed["losses"] == whole["losses"]
    assert resumed["norms"] == whole["norms"]
    exact, again = (_weights(tmp_path / "runs" / one) for one in ("whole", "parts"))
    assert set(again) == set(exact)
    assert all(torch.equal(again[key], tensor) for key, tensor in exact.items())

    if name in WITHOUT_TRL:
        return
    of_trl = run("trl")
    assert len(of_trl) == len(whole["losses"])
    assert of_trl == pytest.approx(whole["losses"], abs=1e-4, rel=0)


@pytest.mark.sweep
@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo_by_trl_s_names(variant: str, data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).symlink_to(file)
    name = f"grpo+{variant}"
    assert in_process("whole", name, tmp_path) == in_process("trl", name, tmp_path) == 0
    ours, theirs = (json.loads((tmp_path / f"{name}-{phase}.json").read_text()) for phase in ("whole", "trl"))
    assert len(theirs) == len(ours["losses"]) == 4
    assert theirs == pytest.approx(ours["losses"], abs=1e-4, rel=0)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    folder = latest(run / "checkpoints")
    assert folder is not None
    (file,) = (one for one in folder.glob("*.safetensors"))
    return load_file(str(file))
