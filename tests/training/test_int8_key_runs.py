"""Recipes whose keys and values are kept in eight bits: rollouts and training compute with the same values."""

from pathlib import Path

import pytest

from tests.helpers.objective_recipes import LOWER, objective_recipe
from toolkit.training.loop import train
from toolkit.training.metrics import read_metrics


@pytest.mark.sweep
def test_grpo_learns_without_a_differing_bit(tmp_path: Path) -> None:
    recipe = objective_recipe(
        tmp_path,
        "grpo",
        {"task": LOWER, "prompts": 8, "num_generations": 8},
        model={"kv_cache_dtype": "int8"},
        train={"max_steps": 12, "batch_tokens": 1024},
        optimizer={"learning_rate": 2e-2, "weight_decay": 0.0},
        checkpoint={"save_steps": None},
    )
    train(recipe, quiet=True)
    lines = read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")
    assert [line["mismatch_bits"] for line in lines] == [0] * 12
    assert all(line["grad_norm"] > 0 for line in lines)
