"""Variants of the policy's loss and of advantages, by their definitions in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer
from toolkit.training.losses import policy_loss
from toolkit.training.objectives.grpo import GRPO

LENGTHS = [3, 1, 4]


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(4)
    logprob, behaviour, advantage = (torch.randn(8, generator=chance, dtype=torch.float64) for _ in range(3))
    return logprob.requires_grad_(), behaviour, advantage


def test_a_bounded_ratio_weighs_the_log_probability() -> None:
    logprob, behaviour, advantage = tokens()
    result = policy_loss(logprob, behaviour, advantage, epsilon_high=1.5, bounded_ratio=True)
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprob)
    ratio = (logprob - behaviour).exp().detach()
    factor = torch.where(ratio > 1.5, 1.5, ratio)
    assert torch.allclose(gradient, -factor * advantage, rtol=1e-12)
    assert torch.equal(result.clipped, (ratio > 1.5) & (advantage > 0))


def test_ratios_are_bounded_on_both_sides() -> None:
    logprob, behaviour, advantage = tokens()
    found = policy_loss(logprob, behaviour, advantage, delta=2.0).loss
    for at, (new, old, a) in enumerate(zip(logprob.tolist(), behaviour.tolist(), advantage.tolist())):
        ratio = torch.tensor(new - old, dtype=torch.float64).exp().item()
        assert found[at].item() == pytest.approx(-min(min(ratio, 2.0) * a, min(max(ratio, 0.8), 1.2) * a), rel=1e-12)
    assert not torch.equal(found, policy_loss(logprob, behaviour, advantage).loss)


def test_a_completions_ratio_is_the_product_of_its_tokens() -> None:
    logprob, behaviour, advantage = tokens()
    found = policy_loss(logprob, behaviour, advantage, lengths=LENGTHS, summed=True).loss
    ratios = torch.cat([part.sum().exp().expand(len(part)) for part in (logprob - behaviour).split(LENGTHS)])
    exact = -torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.2) * advantage)
    assert torch.allclose(found, exact, rtol=1e-12)


def grpo(folder: Path, kind: str, **fields: Any) -> Any:
    given = {"task": LOWER, "prompts": 3, "num_generations": 4, **fields}
    found = Trainer(objective_recipe(folder, kind, given), quiet=True).objective
    assert isinstance(found, GRPO)
    found.begin()
    return found


@pytest.mark.sweep
def test_advantages_by_their_definitions(tmp_path: Path) -> None:
    rewards = torch.tensor([[1.0, 0.0, 3.0, 0.5], [2.0, 2.0, float("nan"), 1.0]], dtype=torch.float64)
    known = rewards[~rewards.isnan()]
    of_batch = grpo(tmp_path / "batch", "grpo", scale_rewards="batch").advantages(rewards, [])
    centred = rewards - rewards.nanmean(1, keepdim=True)
    assert torch.allclose(of_batch, (centred / (known.std() + 1e-4)).nan_to_num(0.0), rtol=1e-12)

    plain = grpo(tmp_path / "rloo", "rloo", beta=0.0, reward_clip_range=(0.0, 2.0))
    found = plain.advantages(rewards, [])
    bounded = rewards.clamp(0.0, 2.0)
    for row, values in zip(found.tolist(), bounded.tolist()):
        for at, value in enumerate(values):
            others = [one for other, one in enumerate(values) if other != at and one == one]
            exact = 0.0 if value != value else value - sum(others) / len(others)
            assert row[at] == pytest.approx(exact, rel=1e-12)


@pytest.mark.sweep
def test_the_weights_of_loss_types(tmp_path: Path) -> None:
    objective = grpo(tmp_path, "grpo", loss_type="bnpo")
    micros = next(objective.updates(0))
    samples = [sample for micro in micros for sample in micro.samples if sample.weight]
    assert len({sample.weight for sample in samples}) == 1
    assert samples[0].weight <= 1.0 / sum(len(sample.tokens) for sample in samples)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("grpo", {"loss_type": "cispo"}, r"objective\.epsilon_high must be given"),
        ("grpo", {"delta": 1.1}, r"objective\.delta must be > 1 \+ objective\.epsilon_high"),
        ("rloo", {"loss_type": "dapo"}, r"objective\.loss_type must be 'grpo' with objective\.kind 'rloo', got 'dapo'"),
        ("grpo", {"reward_funcs": ["a:b"]}, r"objective\.reward_funcs must be given for objective\.data_files"),
        ("grpo", {"reward_weights": [1.0]}, r"objective\.reward_weights must have a weight for each of 0"),
    ],
)
def test_what_does_not_fit(kind: str, fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=said):
        objective_recipe(tmp_path, kind, fields)
