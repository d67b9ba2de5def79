"""Sharded experts in the loop: two processes train as one does, resume bit for bit, and save the whole model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import run_processes
from tests.helpers.rowwise import threads
from tests.helpers.training_recipes import write_corpus
from tests.training.shared_experts import moe_recipe, train_and_resume
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.base import divided

HERE = Path(__file__).parent


def test_two_processes_train_the_recipe_as_one_does(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    with threads(1):
        train_and_resume(tmp_path, "one")
    run_processes("training/shared_experts.py", tmp_path, "two", says="bitwise identical", seconds=300)
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / "runs" / name
        runs.append(
            (
                read_metrics(folder / "metrics.jsonl"),
                load_file(str(folder / "checkpoints/step-000008/model.safetensors")),
            )
        )
    (lines, weights), (others, other_weights) = runs
    assert len(lines) == len(others) == 8
    for line, other in zip(lines, others):
        assert line["num_tokens"] == other["num_tokens"]
        assert abs(line["loss"] - other["loss"]) <= 1e-5
        assert line["loss"] == other["loss"]
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    with pytest.raises(ToolkitError, match="size of expert parallelism must be >= 1 and divide the 1 processes, got 2"):
        Trainer(moe_recipe(tmp_path, "one", **{"train.expert_parallel.size": 2}), quiet=True)
    dense = {"model.config": "{model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"}
    with pytest.raises(ToolkitError, match="RaggedModel has no patched MoE layer"):
        Trainer(moe_recipe(tmp_path, "one", **dense), quiet=True)
    with pytest.raises(ToolkitError, match=r"data.streams must be a multiple of the 2 processes, got 1"):
        divided("data.streams", 1, 2)
    with pytest.raises(ToolkitError, match=r"train.expert_parallel must be null with objective.kind 'grpo'"):
        moe_recipe(tmp_path, "one", objective="{kind: grpo, task: {name: countdown}}")
