"""``optimizer.optim: adamw_8bit``: what is kept, exact resuming, and training that goes as with float32 moments."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, WARMUP, check_resumes, objective_recipe
from toolkit.training import moments
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.precision import LowPrecisionAdamW

EIGHT_BIT = {"optim": "adamw_8bit"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "masters": {"train": {"mixed_precision": "bf16"}},
    "kahan": {"model": {"dtype": "bfloat16"}},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's models are smaller than what is worth 8 bits."""
    monkeypatch.setattr(moments, "SMALLEST", 256)


def bytes_of(state: dict[str, torch.Tensor]) -> int:
    return sum(value.nbytes for name, value in state.items() if name.startswith("exp_avg"))


def test_which_parameters_keep_8_bits() -> None:
    for shape, eight in {(64, 64): True, (63, 64): False, (2, 64, 64): True, (512, 3, 5): False, (8192,): True}.items():
        parameter = torch.nn.Parameter(torch.zeros(shape))
        state = moments.in_8_bits(parameter)
        assert (state["exp_avg"].dtype == torch.uint8) == eight, shape
        per_element = bytes_of(state) / parameter.numel()
        assert per_element == (2 + 8 / 256 if eight else 8), shape


@pytest.mark.parametrize(
    "precision", ["float32", *(pytest.param(one, marks=pytest.mark.sweep) for one in PRECISIONS if one != "float32")]
)
def test_resuming_is_exact(precision: str, tmp_path: Path, small: None) -> None:
    recipe = objective_recipe(tmp_path, "sft", {}, **{**PRECISIONS[precision], "optimizer": EIGHT_BIT})
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    again = check_resumes(whole, recipe)
    states = [
        [trainer.optimizer.optimizer.state[parameter] for parameter in trainer.hf_model.parameters()]
        for trainer in (whole, again)
    ]
    eight = 0
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) and value.dtype == other[key].dtype for key, value in one.items())
        eight += one["exp_avg"].dtype == torch.uint8
    assert eight >= 4


def test_rollouts_see_every_update(tmp_path: Path, small: None) -> None:
    objective = {"task": LOWER, "prompts": 2, "num_generations": 4, "warmup": WARMUP}
    trainer = Trainer(objective_recipe(tmp_path, "grpo", objective, optimizer=EIGHT_BIT), quiet=True)
    trainer.fit()
    lines = read_metrics(trainer.folder / "metrics.jsonl")
    assert all(line["mismatch_bits"] == 0 for line in lines)
    versions = [line["weight_version"] for line in lines]
    assert versions == sorted(set(versions))


@pytest.mark.sweep
def test_a_regression_ends_where_float32_moments_end() -> None:
    """Least squares of a 64 x 64 matrix: both find it, over 300 steps with noise in the gradients."""
    target = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    losses = {}
    for optim in moments.MOMENTS:
        source, weight = torch.Generator().manual_seed(1), torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = LowPrecisionAdamW(
            [{"params": [weight], "weight_decay": 0.0}], lr=2e-2, betas=(0.9, 0.95), eps=1e-8, optim=optim
        )
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 300)
            weight.grad = weight.detach() - target + 0.1 * torch.randn(64, 64, generator=source)
            optimizer.step()
        losses[optim] = float((weight.detach() - target).square().mean())
    assert losses["adamw_torch_fused"] < 4e-3  # 1 at the start
    assert losses["adamw_8bit"] < 1.2 * losses["adamw_torch_fused"]
