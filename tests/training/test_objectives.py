"""Objectives on log-probabilities against dense float64 formulas: values and every gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from toolkit.ops.linear_logprob import linear_logprob
from toolkit.ops.linear_logprob.deferred import DeferredLogits
from toolkit.training.losses import (
    generalized_jsd,
    kl_divergence,
    next_token_loss,
    policy_loss,
    with_tail,
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(rows: int = 12, depth: int = 6, vocabulary: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(9))
    targets[::5] = -100
    return numbers(rows, depth).requires_grad_(), numbers(vocabulary, depth, seed=1).requires_grad_(), targets


def same(ours: torch.Tensor, exact: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    got, wanted = (torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (ours, exact))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("late", [True, False])
def test_cross_entropy(smoothing, z_loss, late):
    hidden, weight, targets = head()
    logits = DeferredLogits(hidden, weight, None) if late else hidden @ weight.T
    ours = next_token_loss(logits, targets, label_smoothing=smoothing, z_loss=z_loss)
    dense = hidden @ weight.T
    exact = F.cross_entropy(dense, targets, ignore_index=-100, label_smoothing=smoothing)
    exact = exact + z_loss * dense.logsumexp(-1)[targets >= 0].square().mean()
    same(ours, exact, [hidden, weight])


@pytest.mark.parametrize("late", [True, False])
def test_tokens_weighed_by_their_probability(late):
    hidden, weight, targets = head()
    logits = DeferredLogits(hidden, weight, None) if late else hidden @ weight.T
    ours = next_token_loss(logits, targets, dft=True)
    counted = targets >= 0
    logprob = (hidden @ weight.T).log_softmax(-1)[counted].gather(1, targets[counted, None])[:, 0]
    same(ours, -(logprob.exp().detach() * logprob).mean(), [hidden, weight])


def test_nothing_to_predict():
    hidden, weight, _ = head()
    loss = next_token_loss(DeferredLogits(hidden, weight, None), torch.full((12,), -100))
    assert loss == 0.0
    assert not any(x.any() for x in torch.autograd.grad(loss, [hidden, weight]))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_policy(advantage):
    hidden, weight, targets = head(vocabulary=50)
    targets = targets.clamp_min(0)
    result = linear_logprob(hidden, weight, targets)
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    dense = log_p.gather(-1, targets[:, None])[:, 0]
    behaviour, reference = dense.detach() + 0.3 * numbers(12, seed=4), dense.detach() + 0.5 * numbers(12, seed=5)
    ours = policy_loss(
        result.logprob, behaviour, torch.tensor(advantage), epsilon=0.1, epsilon_high=0.3,
        reference=reference, beta=0.2,
    )  # fmt: skip
    ratio = (dense - behaviour).exp()
    surrogate = torch.stack([ratio * advantage, ratio.clamp(0.9, 1.3) * advantage]).amin(0)
    distance = reference - dense
    exact = -surrogate + 0.2 * (distance.exp() - distance - 1)
    same(ours.loss, exact, [hidden, weight])
    outside = ratio > 1.3 if advantage > 0 else ratio < 0.9
    assert torch.equal(ours.clipped, outside)
    assert 0 < outside.sum() < 12


def test_a_policy_is_its_own_reference():
    logprob = numbers(5).requires_grad_()
    result = policy_loss(logprob, logprob.detach(), torch.ones(5, dtype=torch.float64), reference=logprob.detach())
    assert torch.equal(result.loss, -torch.ones(5, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(result.loss.sum(), logprob)[0], -torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("candidates", [1, 7, 39])
def test_distillation(candidates):
    """Against the dense distributions with all tokens outside of the teacher's candidates put in one class."""
    hidden, weight, _ = head()
    teacher = linear_logprob(
        numbers(12, 6, seed=7), weight.detach(), torch.zeros(12, dtype=torch.int64), top_k=candidates
    )
    student = linear_logprob(hidden, weight, teacher.top_ids)

    def classes(dense: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(dense, -1)
        kept = p.gather(-1, teacher.top_ids)
        others = p.scatter(-1, teacher.top_ids, 0.0).sum(-1, keepdim=True)
        return torch.cat([kept, others], -1)

    p, q = classes(numbers(12, 6, seed=7) @ weight.detach().T), classes(hidden @ weight.T)
    same(
        kl_divergence(with_tail(teacher.top_logprobs), with_tail(student.logprob)),
        (p * (p / q).log()).sum(-1),
        [hidden, weight],
    )
    for share in (0.5, 0.1):
        m = share * p + (1 - share) * q
        exact = share * (p * (p / m).log()).sum(-1) + (1 - share) * (q * (q / m).log()).sum(-1)
        ours = generalized_jsd(with_tail(teacher.top_logprobs), with_tail(student.logprob), share)
        same(ours, exact, [hidden, weight])


def test_distillation_of_all_tokens():
    hidden, weight, _ = head(vocabulary=9)
    everything = torch.arange(9).expand(12, 9)
    teacher = torch.log_softmax(numbers(12, 9, seed=8), -1)
    student = linear_logprob(hidden, weight, everything).logprob
    dense = torch.log_softmax(hidden @ weight.T, -1)
    same(kl_divergence(teacher, student), (teacher.exp() * (teacher - dense)).sum(-1), [hidden, weight])
    tail = with_tail(teacher)
    assert tail.isfinite().all()
    assert tail[:, -1].max() < math.log(1e-14)
