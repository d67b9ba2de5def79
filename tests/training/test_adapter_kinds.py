"""Kinds of adapters by PEFT's names: each begins as the model, trains, and resumes bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import check_resumes, objective_recipe, weights
from toolkit.training.loop import Trainer

KINDS: list[dict[str, Any]] = [
    {"use_rslora": True, "init_lora_weights": "gaussian"},
    {"use_dora": True},
    {"init_lora_weights": "orthogonal", "r": 4},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
]


@pytest.mark.sweep
@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(fields))
def test_an_adapter_trains_and_resumes(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = objective_recipe(
        tmp_path, "sft", {"warmup": {"max_steps": 2, "batch_tokens": 128}}, model={"lora": {"r": 2, **fields}}
    )
    whole = Trainer(recipe, quiet=True)
    before = weights(whole)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        adapted = whole.hf_model(ids).logits + 0.0
        plain = whole._start_model.initial()(ids).logits + 0.0
    assert torch.allclose(adapted, plain, atol=1e-5)
    if "use_rslora" in fields:
        scalings = {one.scaling["default"] for one in whole.hf_model.modules() if hasattr(one, "lora_A")}
        assert scalings == {16.0 / 2**0.5}
    whole.fit()
    moved = {name for name, tensor in weights(whole).items() if not torch.equal(tensor, before[name])}
    assert any("lora_B" in name for name in moved)
    assert any("magnitude" in name for name in moved) == ("use_dora" in fields)
    saved = {name for name in moved if "modules_to_save" in name}
    assert any("embed_tokens" in name for name in saved) == ("modules_to_save" in fields)
    check_resumes(whole, recipe)


@pytest.mark.sweep
def test_checkpointed_layers_change_no_bit(tmp_path: Path) -> None:
    runs = []
    for name, given in (("kept", False), ("again", True)):
        recipe = objective_recipe(tmp_path, "sft", {}, run_name=name, train={"gradient_checkpointing": given})
        runs.append(Trainer(recipe, quiet=True))
        runs[-1].fit()
    layers = [module for module in runs[1].hf_model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers
    assert all(torch.equal(tensor, weights(runs[1])[name]) for name, tensor in weights(runs[0]).items())
