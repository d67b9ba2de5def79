"""GRPO on an MoE model: rollouts record their routing, and training takes it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.moe_recipes import MOE_CONFIG, moe_recipe
from tests.helpers.objective_recipes import weights
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.grpo import GRPO
from toolkit.training.samples import MicroBatch, filler


def setup(folder: Path, replay: bool, **sections: Any) -> tuple[Trainer, GRPO]:
    objective = {"replay_routing": replay, **sections.pop("objective", {})}
    trainer = Trainer(moe_recipe(folder, "grpo", {}, objective=objective, **sections), quiet=True)
    assert isinstance(trainer.objective, GRPO)
    return trainer, trainer.objective


def test_bitwise_identical_with_and_without_replay(tmp_path: Path) -> None:
    found = []
    for name, replay in (("off", False), ("on", True)):
        trainer, _ = setup(tmp_path, replay, run_name=name, train={"max_steps": 3})
        trainer.fit()
        lines = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
        assert [line["mismatch_bits"] for line in lines] == [0] * 3
        found.append((lines[0]["loss"], lines[0]["reward"], lines[0]["grad_norm"]))
        last = weights(trainer)
    # The last token of a sequence, which no loss reads, may lie in another tile of its experts.
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)
    assert all(tensor.isfinite().all() for tensor in last.values())


@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
def test_training_takes_the_recorded_experts(tmp_path: Path, numerics: str) -> None:
    """Samples carry what the engine recorded, and other experts give other log-probabilities."""
    trainer, policy = setup(tmp_path, True, model={"numerics": numerics}, objective={"num_iterations": 2})
    micros = next(policy.updates(0))
    samples = [sample for micro in micros for sample in micro.samples]
    for sample in samples:
        assert sample.routing is not None
        assert sample.routing.shape == (len(sample.sequence) - 1, 2, 2)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def observer(layer: int, logits: torch.Tensor, ids: torch.Tensor, *_: object) -> None:
        seen[layer].append(ids)

    trainer.ragged.observer = observer
    loss = policy.loss(trainer.forward, micros[0])
    for layer in range(2):
        expected = {tuple(row) for sample in micros[0].samples for row in sample.routing[:, layer].tolist()}
        assert {tuple(row) for row in seen[layer][0].tolist()} == expected
    for sample in samples:
        sample.routing = (sample.routing + 1) % MOE_CONFIG["num_experts"]
    micros[0].first = False
    assert policy.loss(trainer.forward, micros[0]) != loss


def test_samples_that_only_fill_up_are_replayed_too(tmp_path: Path) -> None:
    trainer, policy = setup(tmp_path, True)
    micros = next(policy.updates(0))
    padding = MicroBatch([filler(micros[0].samples[0])])
    assert padding.routing is not None
    assert len(padding.routing[0]) == len(padding.sequences[0]) - 1
    assert policy.loss(trainer.forward, padding).item() == 0.0
    assert policy.rows(padding) == 0
    assert MicroBatch([micros[0].samples[0], type(micros[0].samples[0])([1], [2], [0.0])]).routing is None


def test_a_dense_model_has_nothing_to_replay(tmp_path: Path) -> None:
    recipe = moe_recipe(tmp_path, "grpo", {}, objective={"replay_routing": True})
    config = {name: value for name, value in MOE_CONFIG.items() if "expert" not in name and "norm_topk" not in name}
    config["model_type"] = "llama"
    del config["moe_intermediate_size"]
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    with pytest.raises(ToolkitError, match=r"enable_return_routed_experts must be False for a model without a patched"):
        Trainer(recipe, quiet=True).train_step()
