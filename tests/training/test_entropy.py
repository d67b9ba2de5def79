"""Entropies and temperatures in a policy's loss, references that follow the model, and what losses read of logits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, objective_recipe, resumed, weights
from toolkit.ops.linear_logprob.deferred import DeferredLogits
from toolkit.training.entropy import EntropyTerm
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.grpo_section import GRPOSection
from toolkit.training.readings import Reading

SMALL = {"task": LOWER, "prompts": 3, "num_generations": 4}
CONTEXT: Any = SimpleNamespace(gather_objects=lambda value: [value], reduce_sum=lambda values: list(values))


def first_update(folder: Path, fields: dict[str, Any], tokens: int = 4096) -> tuple[Trainer, list[Any], torch.Tensor]:
    """A trainer in float64, the micro-batches of its first update, and their loss."""
    recipe = objective_recipe(
        folder, "grpo", SMALL | fields, model={"dtype": "float64"}, train={"batch_tokens": tokens}
    )
    trainer = Trainer(recipe, quiet=True)
    micros = list(next(iter(trainer.objective.updates(0))))
    return trainer, micros, torch.stack([trainer.objective.loss(trainer.forward, one) for one in micros]).sum()


def distributions(trainer: Trainer, micros: list[Any], temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, V] before every sampled token by transformers' own arithmetic, and those tokens."""
    rows, tokens = [], []
    for sample in (sample for micro in micros for sample in micro.samples):
        logits = trainer.hf_model(torch.tensor([sample.sequence])).logits[0]
        rows.append(torch.log_softmax(logits[len(sample.prompt) - 1 : -1] / temperature, -1))
        tokens += sample.tokens
    return torch.cat(rows).detach(), torch.tensor(tokens)


@pytest.mark.sweep
@pytest.mark.parametrize("tokens", [4096, 24])
def test_the_bonus_is_the_mean_entropy_of_all_tokens(tmp_path: Path, tokens: int) -> None:
    _, _, plain = first_update(tmp_path / "plain", {}, tokens)
    trainer, micros, loss = first_update(tmp_path / "bonus", {"entropy_coef": 0.5}, tokens)
    assert len(micros) == 1 if tokens == 4096 else len(micros) > 3
    logprobs, _ = distributions(trainer, micros)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    assert (plain - loss).item() == pytest.approx(0.5 * entropy.mean().item(), rel=1e-6)
    trainer.objective.entropy.finish_update(trainer.objective.context)
    found = trainer.objective.finish()[1]
    assert found["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-6)
    assert found["entropy_coef"] == 0.5


def test_the_temperature_is_of_sampling_and_of_training(tmp_path: Path) -> None:
    trainer, micros, _ = first_update(tmp_path, {"rollout": {"max_completion_length": 8, "temperature": 0.6}})
    samples = [sample for micro in micros for sample in micro.samples]
    logprobs, tokens = distributions(trainer, micros, 0.6)
    behaviour = torch.tensor([value for sample in samples for value in sample.behaviour], dtype=torch.float64)
    assert torch.allclose(logprobs.gather(-1, tokens[:, None])[:, 0], behaviour, rtol=0, atol=1e-6)
    found = trainer.objective.finish()[1]
    assert found["mismatch_kl"] < 1e-12


def test_the_coefficient_follows_the_entropy() -> None:
    section = GRPOSection(
        task=LOWER, use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=1.0, entropy_coef_max=0.03,
        entropy_coef_delta=0.01,
    )  # fmt: skip
    term, ones = EntropyTerm(section), torch.ones(4)
    applied, coefficients = [], []
    for entropy in (2.0, 0.5, 0.5, 0.5, 0.5, 3.0):
        applied.append(-term.loss(ones * entropy, ones, 1.0).item() / entropy)
        term.finish_update(CONTEXT)
        coefficients.append(term.coefficient)
    assert coefficients == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.03, 0.02])
    assert applied == pytest.approx([0.0, 0.0, 0.01, 0.02, 0.03, 0.03])


def test_the_tokens_with_the_highest_entropy() -> None:
    term = EntropyTerm(GRPOSection(task=LOWER, top_entropy_quantile=0.4))
    entropy, counted = torch.tensor([0.1, 3.0, 9.0, 2.0, 0.5, 1.0]), torch.tensor([1.0, 1, 0, 1, 1, 1])
    assert term.selected(entropy, counted, CONTEXT).tolist() == [0, 1, 0, 1, 0, 0]
    assert term.selected(entropy, counted * 0, CONTEXT).tolist() == [0] * 6


@pytest.mark.parametrize("deferred", [False, True])
def test_a_reading_is_that_of_the_distribution(deferred: bool) -> None:
    chance = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 3, generator=chance, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, generator=chance, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 2, 3, 3])
    logits = DeferredLogits(hidden, weight, None) if deferred else hidden @ weight.T
    logprob, entropy, collision = Reading(0.7, entropy=True, collision=True)(logits, targets)
    exact = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    assert torch.allclose(logprob, exact.gather(-1, targets[:, None])[:, 0], rtol=1e-12)
    by_hand = -(exact.exp() * exact).sum(-1)
    assert torch.allclose(entropy, by_hand, rtol=1e-12)
    assert torch.allclose(collision, (2 * exact).logsumexp(-1), rtol=1e-12)
    assert not collision.requires_grad
    for one, other in ((logprob.sum() + entropy.sum(), exact.gather(-1, targets[:, None]).sum() + by_hand.sum()),):
        found, wanted = (torch.autograd.grad(value, [hidden, weight]) for value in (one, other))
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, wanted))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("grpo", {**SMALL, "use_adaptive_entropy": True, "entropy_target": 6.0, "entropy_coef_delta": 0.1}),
        ("dpo", {"pairs": 4, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    optimizer = {"learning_rate": 1e-2}
    whole = Trainer(objective_recipe(tmp_path / "whole", kind, fields, optimizer=optimizer), quiet=True)
    whole.fit()
    again = resumed(objective_recipe(tmp_path / "parts", kind, fields, optimizer=optimizer))
    exact, found = weights(whole), weights(again)
    assert all(torch.equal(found[name], value) for name, value in exact.items())
    lines, last = (
        {line["step"]: line for line in read_metrics(tmp_path / name / "runs" / kind / "metrics.jsonl")}
        for name in ("whole", "parts")
    )
    assert {step: line["loss"] for step, line in last.items()} == {step: lines[step]["loss"] for step in last}
    if kind == "dpo":  # the reference moves: margins from it are not those from the initial model
        synced = whole.objective.synced
        assert synced is not None
        initial = dict(whole._start_model.initial().named_parameters())
        assert any(not torch.equal(one, initial[name]) for name, one in synced.tensors().items())
    else:
        assert len({line["entropy_coef"] for line in lines.values()}) > 1
        assert all(line["entropy_coef"] == lines[step]["entropy_coef"] for step, line in last.items())
