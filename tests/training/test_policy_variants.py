"""Variants of the policy's loss and of advantages, by their definitions in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer
from toolkit.training.losses import off_policy_mask, policy_loss
from toolkit.training.objectives.grpo import GRPO

LENGTHS = [3, 1, 4]


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(4)
    logprob, behaviour, advantage = (torch.randn(8, generator=chance, dtype=torch.float64) for _ in range(3))
    return logprob.requires_grad_(), behaviour, advantage


def test_a_bounded_ratio_weighs_the_log_probability() -> None:
    logprob, behaviour, advantage = tokens()
    result = policy_loss(logprob, behaviour, advantage, epsilon_high=1.5, surrogate="cispo")
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


def test_a_soft_gate_instead_of_clipping() -> None:
    logprob, behaviour, advantage = tokens()
    found = policy_loss(logprob, behaviour, advantage, surrogate="sapo", sapo_temperatures=(0.9, 1.3)).loss
    for at, (new, old, a) in enumerate(zip(logprob.tolist(), behaviour.tolist(), advantage.tolist())):
        t = 0.9 if a > 0 else 1.3
        gate = 4 / t / (1 + math.exp(-t * (math.exp(new - old) - 1)))
        assert found[at].item() == pytest.approx(-gate * a, rel=1e-12)


def test_completions_are_weighed_by_the_product_of_their_ratios() -> None:
    logprob, behaviour, advantage = tokens()
    settings = (2.0, 3.0, 1.5, 2.5)
    result = policy_loss(logprob, behaviour, advantage, surrogate="vespo", lengths=LENGTHS, vespo=settings)
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprob)
    ends = [sum(LENGTHS[: at + 1]) for at in range(3)]
    for at, a in enumerate(advantage.tolist()):
        part = next(index for index, end in enumerate(ends) if at < end)
        span = slice(ends[part] - LENGTHS[part], ends[part])
        w = math.exp((logprob - behaviour)[span].sum().item())
        k, rate = settings[:2] if a >= 0 else settings[2:]
        assert gradient[at].item() == pytest.approx(-math.exp(rate - rate * w) * w**k * a, rel=1e-9)


def test_the_ratio_weighs_the_divergence() -> None:
    logprob, behaviour, advantage = tokens()
    reference = behaviour.flip(0)
    both = [
        policy_loss(logprob, behaviour, advantage, reference=reference, beta=0.7, use_bias_correction_kl=on).loss
        for on in (False, True)
    ]
    d = reference - logprob
    exact = 0.7 * (d.exp() - d - 1) * ((logprob - behaviour).exp() - 1)
    assert torch.allclose(both[1] - both[0], exact, rtol=1e-9)


def test_weights_are_of_the_first_term_alone() -> None:
    logprob, behaviour, advantage = tokens()
    plain = policy_loss(logprob, behaviour, advantage).loss
    given = {"reference": behaviour.flip(0), "beta": 0.7}
    weights = torch.arange(8.0, dtype=torch.float64)
    weighed = policy_loss(logprob, behaviour, advantage, weights=weights, **given).loss
    divergence = policy_loss(logprob, behaviour, advantage, **given).loss - plain
    assert torch.allclose(weighed, plain * weights + divergence)


@pytest.mark.sweep
def test_of_trl() -> None:
    """TRL's own functions, which are on padded rows."""
    from trl import GRPOTrainer

    logprob, behaviour, _ = tokens()
    advantages = torch.tensor([0.5, -1.0, -0.2], dtype=torch.float64)
    spread = torch.cat([one.expand(length) for one, length in zip(advantages, LENGTHS)])

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(values.split(LENGTHS), batch_first=True)

    mask = padded(torch.ones(8, dtype=torch.float64))
    rows = {"advantages": advantages[:, None], "mask": mask}
    for threshold in (-0.5, 0.1, 1.0):
        ours = off_policy_mask(logprob, behaviour, spread, LENGTHS, threshold)
        theirs = GRPOTrainer.get_off_policy_mask(
            per_token_logps=padded(logprob), sampling_per_token_logps=padded(behaviour), off_policy_threshold=threshold,
            **rows,
        )  # fmt: skip
        assert torch.equal(padded(ours), theirs * mask)
    found = policy_loss(logprob, behaviour, spread, surrogate="vespo", lengths=LENGTHS).loss
    factor = GRPOTrainer.get_gamma_weights(
        log_ratio_per_token=padded((logprob - behaviour).detach()), importance_sampling_ratio=None, **rows
    )
    assert torch.allclose(padded(found), -factor * rows["advantages"] * padded(logprob), rtol=1e-9)


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
    every = list(samples)
    for name, exact in (("luspo", 1.0 / len(every)), ("vespo", 1.0 / sum(len(one.tokens) for one in every))):
        objective.section = objective.section.model_copy(update={"loss_type": name})
        objective._weigh(every)
        assert [one.weight for one in every] == pytest.approx([exact] * len(every))


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("grpo", {"loss_type": "cispo"}, r"objective\.epsilon_high must be given"),
        ("grpo", {"delta": 1.1}, r"objective\.delta must be > 1 \+ objective\.epsilon_high"),
        ("rloo", {"loss_type": "dapo"}, r"objective\.loss_type must be 'grpo' with objective\.kind 'rloo', got 'dapo'"),
        (
            "grpo",
            {"loss_type": "luspo"},
            r"importance_sampling_level must be 'sequence' with objective\.loss_type",
        ),
        (
            "grpo",
            {"loss_type": "vespo", "importance_sampling_clip_max": 2.0},
            r"importance_sampling_clip_max must be null with objective\.loss_type 'vespo', got 2\.0",
        ),
        ("grpo", {"rollout_func": "a:b", "replay_routing": True}, r"objective\.rollout_func must be null with an env"),
        ("grpo", {"reward_funcs": ["a:b"]}, r"objective\.reward_funcs must be given for objective\.data_files"),
        ("grpo", {"reward_weights": [1.0]}, r"objective\.reward_weights must have a weight for each of 0"),
    ],
)
def test_what_does_not_fit(kind: str, fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=said):
        objective_recipe(tmp_path, kind, fields)
