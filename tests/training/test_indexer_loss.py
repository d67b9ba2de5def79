"""Field ``train.indexer_loss_coef`` in every objective: gradients, weights of micro-batches, the metric, errors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.moe_recipes import KINDS, moe_recipe
from tests.helpers.objective_recipes import weights
from tests.helpers.processes import run_processes
from tests.helpers.sparse_recipes import sparse_recipe
from tests.helpers.training_recipes import tiny_recipe
from toolkit.errors import ToolkitError
from toolkit.patching import index_losses, ragged_forward
from toolkit.state.batch import RaggedBatch
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics

pytest.importorskip("transformers.models.deepseek_v32", reason="needs a transformers with DeepSeek-V3.2")


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trainer.hf_model.named_parameters() if p.grad is not None}
    trainer.hf_model.zero_grad()
    return found


def of_indexers(names: Any) -> set[str]:
    return {name for name in names if ".indexer." in name}


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_adds_the_loss_of_its_update(tmp_path: Path, kind: str) -> None:
    """Indexers have the gradient of the mean over all tokens of an update, and everything else the objective's."""
    accumulate = {"gradient_accumulation_steps": 2} if kind in ("pretrain", "sft") else {}
    recipe = sparse_recipe(tmp_path, kind, 0.7, train={"batch_tokens": 48, **accumulate})
    trainer = Trainer(recipe, quiet=True)
    objective = trainer.objective
    micros = next(objective.updates(0))
    assert len(micros) > 1
    trainer.indexers.begin(micros, objective.rows)
    for index, micro in enumerate(micros):
        loss = objective.loss(trainer.forward, micro)
        part = trainer.indexers.loss(index)
        assert part is not None
        (loss + part).backward()
    ours = gradients(trainer)
    got = trainer.indexers.metrics()

    trainer.ragged.index_losses = None
    with index_losses() as losses:
        for micro in micros:
            objective.loss(trainer.forward, micro).backward(retain_graph=True)
    alone = gradients(trainer)
    assert not of_indexers(alone)
    assert len(of_indexers(ours)) == 2 * 5
    assert all(torch.equal(ours[name], gradient) for name, gradient in alone.items())
    assert {len(one) for one in losses.layers.values()} == {len(next(iter(losses.counts.values())))}
    mean = losses.mean()
    assert got == {"indexer_loss": pytest.approx(mean.item(), rel=1e-5)}
    (0.7 * mean).backward()
    wanted = gradients(trainer)
    assert wanted.keys() == of_indexers(ours)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def held_loss(trainer: Trainer, folder: Path) -> float:
    """The loss of the indexers on two fixed texts."""
    texts = [(folder / "text" / f"m{at}.py").read_text()[:30] for at in (3, 4)]
    sequences = [trainer.tokenizer(text)["input_ids"][:16] for text in texts]
    with index_losses() as losses:
        ragged_forward(trainer.hf_model, RaggedBatch.from_sequences(sequences))
    return losses.mean().item()


@dataclass
class Run:
    """30 steps: what they changed, and the loss of the indexers on fixed texts before and after."""

    before: float
    after: float
    changed: set[str]
    frozen: set[str]
    lines: list[dict[str, Any]]


def run(tmp_path: Path, name: str, coefficient: float, **sections: Any) -> Run:
    sections = {"train": {"max_steps": 30}, "checkpoint": {"save_steps": None}, **sections}
    recipe = sparse_recipe(tmp_path, "pretrain", coefficient, run_name=name, **sections)
    trainer = Trainer(recipe, quiet=True)
    start, before = weights(trainer), held_loss(trainer, tmp_path)
    trainer.fit()
    changed = {name for name, tensor in weights(trainer).items() if not torch.equal(start[name], tensor)}
    lines = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
    frozen = {name for name, parameter in trainer.hf_model.named_parameters() if not parameter.requires_grad}
    return Run(before, held_loss(trainer, tmp_path), changed, frozen, lines)


def test_indexers_learn_with_it_and_stay_without_it(tmp_path: Path) -> None:
    """Attention gets sharper in these steps: indexers that do not follow fall behind."""
    learnt = run(tmp_path, "with", 1.0)
    assert len(of_indexers(learnt.changed)) == 2 * 5
    assert learnt.after < learnt.before
    losses = [line["indexer_loss"] for line in learnt.lines]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    stayed = run(tmp_path, "without", 0.0)
    assert stayed.changed == learnt.changed - of_indexers(learnt.changed)
    assert stayed.before == learnt.before
    assert stayed.after > stayed.before
    assert "indexer_loss" not in stayed.lines[0]
    assert stayed.frozen == of_indexers(learnt.changed)
    assert not learnt.frozen


def test_indexers_alone_can_be_trained(tmp_path: Path) -> None:
    """What they are to learn stays the same then."""
    model = {"freeze_parameters": ["*"], "trainable_parameters": ["*.indexer.*"]}
    alone = run(tmp_path, "alone", 1.0, model=model)
    assert len(alone.changed) == len(of_indexers(alone.changed)) == 2 * 5
    assert alone.after < 0.6 * alone.before


def test_a_model_without_an_indexer_is_refused(tmp_path: Path) -> None:
    recipe = moe_recipe(tmp_path, "sft", {}, train={"indexer_loss_coef": 0.5})
    with pytest.raises(
        ToolkitError, match=r"train\.indexer_loss_coef must be 0 for a model without a patched indexer .*, got 0\.5\."
    ):
        Trainer(recipe, quiet=True)


def test_a_run_that_trains_no_indexer_is_refused(tmp_path: Path) -> None:
    recipe = sparse_recipe(tmp_path, "sft", 0.5, model={"freeze_parameters": ["*.indexer.*"]})
    with pytest.raises(ToolkitError, match=r"must be 0 for a run that trains no parameter of an indexer, got 0\.5;"):
        Trainer(recipe, quiet=True)


def test_a_negative_coefficient_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=r"train\.indexer_loss_coef must be .*, got -0\.1"):
        tiny_recipe(tmp_path, train={"indexer_loss_coef": -0.1})


def test_a_run_of_indexers_alone_needs_it(tmp_path: Path) -> None:
    model = {"freeze_parameters": ["*"], "trainable_parameters": ["*.indexer.*"]}
    with pytest.raises(ToolkitError, match="indexer_loss_coef must be > 0 for a run that trains indexers alone, got 0"):
        Trainer(sparse_recipe(tmp_path, "sft", 0.0, model=model), quiet=True)


@pytest.mark.sweep
@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_two_processes_have_the_loss_of_one(tmp_path: Path, coefficient: float) -> None:
    run_processes("training/two_indexers.py", tmp_path, coefficient, says="same weights", seconds=300)
    trainer = Trainer(sparse_recipe(tmp_path, "dpo", coefficient, run_name="one", train={"max_steps": 2}), quiet=True)
    trainer.fit()
    one, two = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    assert ("indexer_loss" in one[0]) == (coefficient > 0)
    if coefficient:
        assert one[0]["indexer_loss"] == pytest.approx(two[0]["indexer_loss"], rel=1e-5)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-4)
