"""Losses of preferences against their papers' formulas in float64, and runs of the objectives that have them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.objective_recipes import LOWER, check_resumes, dense_logprobs, objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer, train
from toolkit.training.objectives.preference import Preference
from toolkit.training.preference_losses import (
    WITH_REFERENCE,
    WITHOUT_REFERENCE,
    Scores,
    Settings,
    alpha_rewards,
    odds_ratio,
)

BETA, SMOOTHING, TAU, GAMMA = 0.3, 0.2, 0.05, 0.4


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(x: float, e: float = SMOOTHING) -> float:
    return -(1 - e) * math.log(s(x)) - e * math.log(s(-x))


def kl_to_smoothing(p: float) -> float:
    return p * math.log(p / (1 - SMOOTHING)) + (1 - p) * math.log((1 - p) / SMOOTHING)


def swapped(x: float) -> float:
    return -(1 - SMOOTHING) * math.log(s(x)) + SMOOTHING * math.log(s(-x))


def blend(x: float) -> float:
    return (1 - s(x / TAU)) * -math.log(s(x)) + s(x / TAU) * math.exp(-x)


def odds(mean: float) -> float:
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


# Of r(chosen), r(rejected) and their means over tokens.
FORMULAS: dict[str, Callable[[float, float, float, float], float]] = {
    "sigmoid": lambda c, r, mc, mr: smoothed(BETA * (c - r)),
    "sigmoid_norm": lambda c, r, mc, mr: smoothed(BETA * (mc - mr)),
    "hinge": lambda c, r, mc, mr: max(0.0, 1 - BETA * (c - r)),
    "ipo": lambda c, r, mc, mr: ((mc - mr) - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda c, r, mc, mr: kl_to_smoothing(s(BETA * (c - r))),
    "nca_pair": lambda c, r, mc, mr: -math.log(s(BETA * c)) - (math.log(s(-BETA * c)) + math.log(s(-BETA * r))) / 2,
    "robust": lambda c, r, mc, mr: (
        (-(1 - SMOOTHING) * math.log(s(BETA * (c - r))) + SMOOTHING * math.log(s(-BETA * (c - r))))
        / (1 - 2 * SMOOTHING)
    ),
    "bco_pair": lambda c, r, mc, mr: -math.log(s(BETA * c)) - math.log(s(-BETA * r)),
    "sppo_hard": lambda c, r, mc, mr: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "apo_zero": lambda c, r, mc, mr: 1 - s(BETA * c) + s(BETA * r),
    "apo_down": lambda c, r, mc, mr: s(BETA * c) + 1 - s(BETA * (c - r)),
    "discopop": lambda c, r, mc, mr: blend(BETA * (c - r)),
}
WITHOUT: dict[str, Callable[[float, float, float, float], float]] = {
    "sigmoid": FORMULAS["sigmoid"],
    "hinge": FORMULAS["hinge"],
    "ipo": FORMULAS["ipo"],
    "simpo": lambda c, r, mc, mr: smoothed(BETA * (mc - mr) - GAMMA),
}


def scores(reference: bool) -> Scores:
    source = torch.Generator().manual_seed(0)
    chosen, rejected, one, other = (-5 * torch.rand(9, generator=source, dtype=torch.float64) for _ in range(4))
    if not reference:
        one, other = torch.zeros(9).double(), torch.zeros(9).double()
    lengths = torch.arange(1.0, 10.0).double(), torch.arange(9.0, 0.0, -1.0).double()
    return Scores(chosen.requires_grad_(), rejected.requires_grad_(), one, other, *lengths)


def rows(given: Scores) -> list[tuple[float, float, float, float]]:
    found = []
    for c, r, cr, rr, n, m in zip(*(column.tolist() for column in given)):
        found.append((c - cr, r - rr, (c - cr) / n, (r - rr) / m))
    return found


def check(ours: Tensor, formula: Callable[[float, float, float, float], float], given: Scores) -> None:
    exact = [formula(*row) for row in rows(given)]
    assert ours.tolist() == pytest.approx(exact, rel=1e-9)
    gradients = torch.autograd.grad(ours.sum(), [given.chosen, given.rejected])
    for side, gradient in enumerate(gradients):
        for at, (c, r, mc, mr) in enumerate(rows(given)):
            step = 1e-6
            length = (given.chosen_length, given.rejected_length)[side][at].item()
            moved = [
                formula(c + d, r, mc + d / length, mr) if side == 0 else formula(c, r + d, mc, mr + d / length)
                for d in (step, -step)
            ]
            assert gradient[at].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=2e-5, abs=1e-8)


SORTED = {"aot", "aot_unpaired"}


@pytest.mark.parametrize("name", [name for name in WITH_REFERENCE if name not in SORTED])
def test_losses_with_a_reference(name: str) -> None:
    given = scores(reference=True)
    check(WITH_REFERENCE[name](given, Settings(BETA, SMOOTHING, TAU)), FORMULAS[name], given)


@pytest.mark.parametrize("name", sorted(SORTED))
def test_losses_of_sorted_pairs(name: str) -> None:
    given = scores(reference=True)
    chosen, rejected, one, other = (column.tolist() for column in given[:4])
    if name == "aot":
        first, second = zip(*((c - r, a - b) for c, r, a, b in zip(chosen, rejected, one, other)))
    else:
        first, second = zip(*((c - a, r - b) for c, r, a, b in zip(chosen, rejected, one, other)))
    exact = [smoothed(BETA * (x - y)) for x, y in zip(sorted(first), sorted(second))]
    ours = WITH_REFERENCE[name](given, Settings(BETA, SMOOTHING))
    assert ours.tolist() == pytest.approx(exact, rel=1e-9)
    slopes = dict(zip(sorted(first), ((y - x) for x, y in zip(sorted(first), sorted(second)))))
    (gradient,) = torch.autograd.grad(ours.sum(), [given.chosen])
    for at, value in enumerate(first):  # of a value by its place in the order
        x = -BETA * slopes[value]
        assert gradient[at].item() == pytest.approx(BETA * (SMOOTHING * s(x) - (1 - SMOOTHING) * s(-x)), rel=1e-9)


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_losses_without_a_reference(name: str) -> None:
    given = scores(reference=False)
    check(WITHOUT_REFERENCE[name](given, Settings(BETA, SMOOTHING, simpo_gamma=GAMMA)), WITHOUT[name], given)


def test_odds_ratio() -> None:
    given = scores(reference=False)
    check(odds_ratio(given, Settings(BETA)), lambda c, r, mc, mr: -BETA * math.log(s(odds(mc) - odds(mr))), given)
    certain = given._replace(chosen=torch.zeros(9).double())
    assert odds_ratio(certain, Settings(BETA)).isfinite().all()


def summed(model: Any, prompt: list[int], completion: list[int]) -> float:
    return float(dense_logprobs(model, prompt + completion)[-len(completion) :].sum().detach())


# Of r(chosen), its mean, r(rejected) and its mean; the weight of the chosen completions' cross-entropy is beside it.
OfPair = Callable[[float, float, float, float], float]
CASES: list[tuple[str, dict[str, Any], OfPair, float]] = [
    ("dpo", {"loss_type": "ipo", "sft_weight": 0.25}, lambda c, mc, r, mr: (mc - mr - 1) ** 2, 0.25),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}, lambda c, mc, r, mr: -math.log(s(0.5 * (mc - mr) - 0.5)), 0.0),
    ("cpo", {}, lambda c, mc, r, mr: -math.log(s(0.5 * (c - r))), 1.0),
    ("orpo", {}, lambda c, mc, r, mr: -0.5 * math.log(s(odds(mc) - odds(mr))) - mc, 0.0),
]


@pytest.mark.parametrize(("kind", "fields", "of_pair", "weight"), CASES)
def test_a_run_has_the_loss_of_the_definition(
    kind: str, fields: dict[str, Any], of_pair: OfPair, weight: float, tmp_path: Path
) -> None:
    recipe = objective_recipe(
        tmp_path, kind, {"pairs": 5, "beta": 0.5, **fields}, model={"dtype": "float64"}, train={"batch_tokens": 64}
    )
    trainer = Trainer(recipe, quiet=True)
    objective = trainer.objective
    assert isinstance(objective, Preference)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.hf_model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=chance, dtype=torch.float64))
    micros = next(objective.updates(0))
    assert len(micros) > 1
    loss = torch.stack([objective.loss(trainer.forward, micro) for micro in micros]).detach().sum()
    exact, supervised, counted = [], 0.0, 0
    for pair in (pair for micro in micros for pair in micro if pair.weight):
        ratios: list[float] = []
        for tokens in (pair.chosen, pair.rejected):
            own = summed(trainer.hf_model, pair.prompt, tokens)
            reference = 0.0
            if objective.reference is not None:
                reference = summed(objective.reference.model, pair.prompt, tokens)
            ratios += [own - reference, (own - reference) / len(tokens)]
            if tokens is pair.chosen:
                supervised, counted = supervised - own, counted + len(tokens)
        exact.append(of_pair(*ratios))
    assert float(loss) == pytest.approx(sum(exact) / len(exact) + weight * supervised / counted, rel=1e-6)


@pytest.mark.parametrize(("kind", "fields"), [("cpo", {"loss_type": "simpo", "beta": 2.0}), ("orpo", {})])
def test_preferences_are_learnt_without_a_reference(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    sections = {
        "train": {"max_steps": 15, "batch_tokens": 512},
        "optimizer": {"learning_rate": 1e-2},
        "evaluate": {"do_eval": True},
        "checkpoint": {"save_steps": None},
    }
    metrics = train(objective_recipe(tmp_path, kind, {"task": LOWER, "pairs": 16, **fields}, **sections), quiet=True)
    before = metrics["before_training"]
    assert metrics["eval_logps/accuracies"] > 0.95
    assert metrics["eval_rewards/margins"] > 2 * abs(before["eval_rewards/margins"])


def test_resuming_is_exact(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "orpo", {"pairs": 6})
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    check_resumes(whole, recipe)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"loss_type": "grpo"}, "objective.loss_type must be one of"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be > 0 for objective.loss_type 'exo_pair', got 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing must be 0 for objective.loss_type 'hinge'"),
    ],
)
def test_contradictions(fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=sentence):
        objective_recipe(tmp_path, "dpo", fields)


@pytest.mark.parametrize("alpha", [0.25, -0.05])
@pytest.mark.parametrize("means", [False, True])
def test_rewards_of_alpha_are_powers_of_probabilities(alpha: float, means: bool) -> None:
    """In float32 of sums whose probabilities are 0 there; the formula in float64."""
    logprobs, lengths = torch.tensor([-0.5, -11.0, -200.0]), torch.tensor([1, 4, 40])
    zeros = torch.zeros(3)
    found = alpha_rewards(Scores(logprobs, logprobs, zeros, zeros, lengths, lengths), alpha, means=means)
    for one, logprob, count in zip(found.chosen.tolist(), logprobs.tolist(), lengths.tolist()):
        tokens = count if means else 1
        probability = math.exp(logprob / tokens)
        assert one == pytest.approx((1 - probability**-alpha) / alpha * tokens, rel=1e-5)
    assert torch.equal(found.chosen, found.rejected)
