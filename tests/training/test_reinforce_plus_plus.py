"""REINFORCE++: advantages of every token by plain arithmetic in float64, and runs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, check_resumes, dense_logprobs, objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer, train
from toolkit.training.losses import discounted_returns, kl_estimate
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.reinforce_plus_plus import ReinforcePlusPlus


def trainer_of(folder: Path, **fields: Any) -> Trainer:
    given = {"task": LOWER, "prompts": 3, "num_generations": 2, "beta": 0.3, **fields}
    return Trainer(objective_recipe(folder, "reinforce_plus_plus", given, model={"dtype": "float64"}), quiet=True)


def moved(trainer: Trainer) -> None:
    """Away from the initial model, so that there is a divergence."""
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.hf_model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=chance, dtype=parameter.dtype)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_by_the_definition(estimator: str, baseline: bool, gamma: float, tmp_path: Path) -> None:
    kind = "reinforce_baseline" if baseline else "reinforce"
    trainer = trainer_of(tmp_path, kl_estimator=estimator, advantage_estimator=kind, gamma=gamma)
    objective: Any = trainer.objective
    assert isinstance(objective, ReinforcePlusPlus)
    moved(trainer)
    objective.begin()
    groups = objective._groups(0)
    rewards = [[sample.advantage for sample in group] for group in groups]
    objective.finish_advantages(groups)
    initial = objective._initial.model

    texts, returns = [], []
    for group, of_group in zip(groups, rewards):
        assert not baseline or math.fsum(of_group) == pytest.approx(0.0, abs=1e-12)
        for sample, reward in zip(group, of_group):
            values = [
                dense_logprobs(model, sample.sequence)[-len(sample.tokens) :].tolist()
                for model in (trainer.hf_model, initial)
            ]
            each = []
            for own, theirs in zip(*values, strict=True):
                d = own - theirs
                each.append(-0.3 * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator])
            each[-1] += reward
            returns.append([sum(gamma ** (k - t) * each[k] for k in range(t, len(each))) for t in range(len(each))])
            texts.append(sample)
    flat = [value for one in returns for value in one]
    mean = math.fsum(flat) / len(flat)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in flat) / len(flat))
    for sample, one in zip(texts, returns):
        exact = [(value - mean) / deviation for value in one]
        assert sample.token_advantages == pytest.approx(exact, rel=1e-7, abs=1e-9)


@pytest.mark.sweep
def test_the_divergence_in_the_loss(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, use_kl_loss=True, kl_estimator="k2", advantage_estimator="reinforce_baseline")
    objective: Any = trainer.objective
    moved(trainer)
    micros = next(objective.updates(0))
    loss = sum(objective.loss(trainer.forward, micro) for micro in micros)
    samples = [sample for micro in micros for sample in micro.samples if sample.weight]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        own, theirs = (
            dense_logprobs(model, sample.sequence)[-len(sample.tokens) :]
            for model in (trainer.hf_model, objective.reference.model)
        )
        advantage = torch.tensor(sample.token_advantages, dtype=torch.float64)
        total = total + (-advantage + 0.3 * (own - theirs) ** 2 / 2).sum()  # the ratio is 1
        tokens += len(sample.tokens)
    assert float(loss) == pytest.approx(float(total / tokens), rel=1e-6)
    assert objective.finish()[1]["kl"] > 0


def test_returns_and_estimates_by_their_definitions() -> None:
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert discounted_returns(rewards, 0.5).tolist() == [1 - 1 + 0.125, -2 + 0.25, 0.5]
    assert discounted_returns(rewards, 1.0).tolist() == [-0.5, -1.5, 0.5]
    assert discounted_returns(rewards[:0], 0.5).tolist() == []
    p = torch.tensor([0.2, 0.8], dtype=torch.float64)
    q = torch.tensor([0.5, 0.5], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):  # unbiased
        assert torch.allclose((p * kl_estimate(p.log(), q.log(), kind)).sum(), exact)


@pytest.mark.sweep
def test_one_completion_a_prompt_learns_and_resumes(tmp_path: Path) -> None:
    given = {"task": LOWER, "prompts": 16, "num_generations": 1, "beta": 0.001}
    sections: dict[str, Any] = {"optimizer": {"learning_rate": 2e-2}, "train": {"batch_tokens": 512}}
    recipe = objective_recipe(tmp_path, "reinforce_plus_plus", given, **sections)
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    check_resumes(whole, recipe)
    sections["train"] = {"batch_tokens": 512, "max_steps": 30}
    train(objective_recipe(tmp_path, "reinforce_plus_plus", given, run_name="long", **sections), quiet=True)
    rewards = [line["reward"] for line in read_metrics(tmp_path / "runs" / "long" / "metrics.jsonl")]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_generations": 1, "advantage_estimator": "reinforce_baseline"}, r"num_generations must be >= 2"),
        ({"use_kl_loss": True}, r"kl_estimator must be 'k2' or 'k3' with objective\.use_kl_loss"),
        ({"scale_rewards": "batch"}, r"scale_rewards must be 'group' with objective\.kind 'reinforce_plus_plus'"),
    ],
)
def test_what_does_not_fit(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=said):
        objective_recipe(tmp_path, "reinforce_plus_plus", {"task": LOWER, **fields})
