"""Losses against a teacher's distribution, by their definitions in float64 and by TRL's functions."""

from typing import Any

import pytest
import torch

from toolkit.training.distillation_losses import Comparison, distillation_loss

ROWS, VOCABULARY = 6, 9


def logits(seed: int) -> torch.Tensor:
    return 3.0 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Of the teacher's p and the student's q."""
    if beta == 0.0:
        return (p * (p / q).log()).sum()
    if beta == 1.0:
        return (q * (q / p).log()).sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_logits(beta: float, temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    how = Comparison("full_logits", beta, temperature=temperature)
    found = distillation_loss(student, teacher, how, torch.zeros(ROWS, dtype=torch.int64))
    for at in range(ROWS):
        p, q = ((one[at] / temperature).softmax(-1) for one in (teacher, student))
        assert found[at].item() == pytest.approx(divergence(p, q, beta).item(), rel=1e-9)


@pytest.mark.parametrize("mode", ["topk_logits", "teacher_topk_logits"])
@pytest.mark.parametrize("add_tail", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_top_k(mode: Any, add_tail: bool, beta: float) -> None:
    student, teacher = logits(3), logits(4)
    found = distillation_loss(
        student, teacher, Comparison(mode, beta, 4, add_tail), torch.zeros(ROWS, dtype=torch.int64)
    )
    for at in range(ROWS):
        p, q = teacher[at].softmax(-1), student[at].softmax(-1)
        best = (q if mode == "topk_logits" else p).topk(4).indices
        if add_tail:
            p, q = (torch.cat([one[best], (1 - one[best].sum())[None]]) for one in (p, q))
        else:
            p, q = (one[best] / one[best].sum() for one in (p, q))
        assert found[at].item() == pytest.approx(divergence(p, q, beta).item(), rel=1e-8)


def test_the_sampled_token_has_the_gradient_of_the_divergence_in_expectation() -> None:
    teacher, exact = logits(6), logits(5).requires_grad_()
    how = Comparison("sampled_token", 1.0)
    probabilities = exact.detach().softmax(-1)
    expected = torch.zeros_like(exact)
    for token in range(VOCABULARY):
        student = exact.detach().clone().requires_grad_()
        distillation_loss(student, teacher, how, torch.full((ROWS,), token)).sum().backward()
        expected += probabilities[:, token, None] * student.grad
    p, q = teacher.softmax(-1), exact.softmax(-1)
    (q * (q / p).log()).sum().backward()
    torch.testing.assert_close(expected, exact.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.sweep
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_of_trl(alpha: float) -> None:
    from trl.experimental.sdft import loss_utils

    student, teacher = logits(7), logits(8)
    tokens = torch.arange(ROWS) % VOCABULARY
    for add_tail in (False, True):
        theirs = loss_utils.compute_topk_self_distillation_loss(
            student, teacher, distillation_topk=5, distillation_alpha=alpha, distillation_add_tail=add_tail
        )
        ours = distillation_loss(student, teacher, Comparison("topk_logits", alpha, 5, add_tail), tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    theirs = loss_utils.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
    ours = distillation_loss(student, teacher, Comparison("full_logits", alpha), tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    if alpha == 1.0:
        theirs = loss_utils.compute_sampled_token_self_distillation_loss(
            student, teacher, tokens, distillation_alpha=1.0
        )
        ours = distillation_loss(student, teacher, Comparison("sampled_token", alpha), tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
