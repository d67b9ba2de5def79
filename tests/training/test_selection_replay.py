"""GRPO on a model with sparse attention: rollouts record the keys that tokens attend, and training takes them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, objective_recipe
from tests.helpers.sparse_recipes import SPARSE_CONFIG
from toolkit.errors import ToolkitError
from toolkit.state.replay import SelectionReplay
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.grpo import GRPO
from toolkit.training.samples import MicroBatch, filler

pytest.importorskip("transformers.models.deepseek_v32", reason="needs a transformers with DeepSeek-V3.2")


def setup(folder: Path, config: dict[str, Any] = SPARSE_CONFIG, **sections: Any) -> tuple[Trainer, GRPO]:
    objective = {"task": LOWER, "prompts": 3, "num_generations": 4, **sections.pop("objective", {})}
    trainer = Trainer(objective_recipe(folder, "grpo", objective, model={"config": config}, **sections), quiet=True)
    assert isinstance(trainer.objective, GRPO)
    return trainer, trainer.objective


def test_bitwise_identical_with_and_without_replay(tmp_path: Path) -> None:
    found = []
    for name, replay in (("off", {}), ("on", {"replay_selection": True, "replay_routing": True})):
        trainer, _ = setup(tmp_path, objective=replay, run_name=name, train={"max_steps": 2})
        trainer.fit()
        lines = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
        assert [line["mismatch_bits"] for line in lines] == [0] * 2
        found.append((lines[0]["loss"], lines[0]["reward"], lines[0]["grad_norm"]))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)


def test_training_takes_the_recorded_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update too, when indexers would choose others; other keys give other log-probabilities."""
    trainer, policy = setup(tmp_path, objective={"replay_selection": True, "num_iterations": 2})
    updates = policy.updates(0)
    micros = next(updates)
    samples = [sample for micro in micros for sample in micro.samples]
    for sample in samples:
        assert sample.selection is not None
        assert sample.selection.shape == (len(sample.sequence) - 1, 2, 4)
    taken: list[torch.Tensor] = []
    take = SelectionReplay.take

    def kept(self: SelectionReplay, layer: int, choose: Any) -> torch.Tensor:
        taken.append(take(self, layer, choose))
        fresh.append(choose())
        return taken[-1]

    fresh: list[torch.Tensor] = []
    monkeypatch.setattr(SelectionReplay, "take", kept)
    expected = {tuple(row) for sample in micros[0].samples for row in sample.selection[:, 0].tolist()} | {(-1,) * 4}
    loss = policy.loss(trainer.forward, micros[0])
    assert {tuple(row) for row in taken[0].tolist()} == expected
    indexers = [p for name, p in trainer.hf_model.named_parameters() if ".indexer." in name]
    with torch.no_grad():
        for parameter in indexers:
            parameter.copy_(torch.randn_like(parameter))
    micros = next(updates)
    taken.clear()
    fresh.clear()
    assert policy.loss(trainer.forward, micros[0]) == loss  # nothing else reads the indexers
    assert {tuple(row) for row in taken[0].tolist()} == expected
    assert not torch.equal(fresh[0], taken[0])
    for sample in micros[0].samples:
        at = torch.arange(len(sample.selection))[:, None, None]
        sample.selection = torch.where(torch.arange(4) == 0, at.int(), -1).expand(-1, 2, -1)  # each token itself
    assert policy.loss(trainer.forward, micros[0]) != loss


def test_samples_that_only_fill_up_are_replayed_too(tmp_path: Path) -> None:
    trainer, policy = setup(tmp_path, objective={"replay_selection": True})
    micros = next(policy.updates(0))
    padding = MicroBatch([filler(micros[0].samples[0])])
    assert padding.selection is not None
    assert len(padding.selection[0]) == len(padding.sequences[0]) - 1
    assert policy.loss(trainer.forward, padding).item() == 0.0
    assert MicroBatch([micros[0].samples[0], type(micros[0].samples[0])([1], [2], [0.0])]).selection is None


def test_a_model_without_an_indexer_has_nothing_to_replay(tmp_path: Path) -> None:
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    trainer, _ = setup(tmp_path, {**llama, "num_attention_heads": 2}, objective={"replay_selection": True})
    with pytest.raises(ToolkitError, match=r"enable_return_selected_keys must be False for a model without a patched"):
        trainer.train_step()
