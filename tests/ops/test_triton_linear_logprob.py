"""Triton linear_logprob in Triton's interpreter, against dense fp64."""

import math

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers.interpreter import poisoned, row_by_row
from toolkit.errors import ToolkitError
from toolkit.ops.linear_logprob import tiles
from toolkit.ops.linear_logprob.triton import largest, linear_logprob
from toolkit.ops.linear_logprob.triton_backward import linear_logprob_backward


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    """Several splits and chunks at small sizes; what is not written stays NaN."""
    monkeypatch.setattr(tiles, "SPLIT", 32)
    monkeypatch.setattr(tiles, "CHUNK", 48)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    with poisoned():
        yield


VARIANTS = {
    "plain": (False, False, 1.0, 0.0),
    "bias": (True, False, 1.0, 0.0),
    "capped": (False, False, 1.5, 2.0),
    "everything": (True, True, 0.5, 3.0),
}


def problem(rows, depth, vocabulary, variant="plain", dtype=torch.float32, choices=1):
    """hidden, weight, bias, targets (some ignored), temperature, scale, softcap."""
    g = torch.Generator().manual_seed(rows + depth)
    biased, tempered, scale, softcap = VARIANTS[variant]
    hidden, weight = torch.randn(rows, depth, generator=g), torch.randn(vocabulary, depth, generator=g)
    bias = torch.randn(vocabulary, generator=g).to(dtype) if biased else None
    targets = torch.randint(-vocabulary // 4, vocabulary, (rows, choices), generator=g)
    heat = torch.rand(rows, generator=g, dtype=torch.float64) + 0.5 if tempered else None
    return [hidden.to(dtype), (1.5 * weight * depth**-0.5).to(dtype), bias, targets, heat, scale, softcap]


def dense(hidden, weight, bias, targets, heat, scale, softcap):
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if heat is not None:
        z = z / heat[:, None]
    log_p = torch.log_softmax(z, -1)
    own = torch.where(targets < 0, 0.0, log_p.gather(-1, targets.clamp_min(0)))
    return own, torch.logsumexp(z, -1), -(log_p.exp() * log_p).sum(-1), z.mean(-1)


def cotangents(rows, choices, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, choices, generator=g), *(torch.randn(rows, generator=g) for _ in range(3))]


def backward(arguments, outputs, grads, needs=(True, True, True)):
    hidden, weight, bias, targets, heat, scale, softcap = arguments
    statistics = (targets, heat, outputs[1], outputs[2], scale, softcap)
    return linear_logprob_backward(*grads, hidden, weight, bias, *statistics, *needs)


def assert_near(value, exact, limit):
    assert value.shape == exact.shape
    if exact.numel():
        assert float((value.double() - exact).abs().max()) <= limit * max(float(exact.abs().max()), 0.1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("rows", "depth", "vocabulary", "choices"), [(1, 1, 1, 1), (3, 33, 45, 2), (21, 40, 70, 1), (0, 8, 9, 1)]
)
def test_values_and_every_gradient_match_fp64(variant, rows, depth, vocabulary, choices):
    arguments = problem(rows, depth, vocabulary, variant, choices=choices)
    leaves = [t.double().requires_grad_() if t is not None else None for t in arguments[:3]]
    expected = dense(*leaves, *arguments[3:])
    outputs = linear_logprob(*arguments, 0)
    for value, exact in zip(outputs, expected):
        assert value.dtype == torch.float32
        assert_near(value, exact.detach(), 3e-6)
    grads = cotangents(rows, choices)
    given = [leaf for leaf in leaves if leaf is not None]
    exact = torch.autograd.grad(expected, given, [g.double() for g in grads])
    got = backward(arguments, outputs, grads)
    again = backward(arguments, outputs, grads)
    assert all(torch.equal(*pair) for pair in zip(got, again))
    for value, wanted in zip(got, exact):
        assert_near(value, wanted, 3e-6)
    assert got[2].numel() == (0 if arguments[2] is None else vocabulary)


def test_half_precision():
    arguments = problem(9, 40, 60, "bias", torch.float16)
    leaves = [t.double().requires_grad_() for t in arguments[:3]]
    expected = dense(*leaves, *arguments[3:])
    outputs = linear_logprob(*arguments, 0)
    for value, exact in zip(outputs, expected):
        assert value.dtype == torch.float32
        assert_near(value, exact.detach(), 2e-3)
    grads = cotangents(9, 1)
    for value, exact in zip(
        backward(arguments, outputs, grads), torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    ):
        assert value.dtype == torch.float16
        assert_near(value, exact, 3e-3)


def test_a_row_keeps_its_bits():
    arguments = problem(40, 33, 70, "everything")
    hidden, weight, bias, targets, heat, scale, softcap = arguments
    whole = linear_logprob(*arguments, 3)
    grads = cotangents(40, 1)
    dx = backward(arguments, whole, grads, (True, False, False))[0]
    for size in (1, 17, 30):
        rows = torch.randperm(40)[:size]
        part = [hidden[rows], weight, bias, targets[rows], heat[rows], scale, softcap]
        outputs = linear_logprob(*part, 3)
        assert all(torch.equal(value, full[rows]) for value, full in zip(outputs, whole))
        assert torch.equal(backward(part, outputs, [g[rows] for g in grads], (True, False, False))[0], dx[rows])


def test_rows_without_gradient_are_left_out():
    """Their hidden states may even be NaN: nothing of them is read."""
    arguments = problem(40, 20, 50)
    hidden, _, _, targets, *_ = arguments
    outputs = linear_logprob(*arguments, 0)
    masked = torch.rand(40) < 0.7
    targets[masked] = -100
    zero = torch.zeros(40)
    grads = [torch.randn(40, 1), zero, zero, zero]
    keep = ~masked & (targets[:, 0] >= 0)
    dx, dw, _ = backward(arguments, outputs, grads)
    part = [hidden[keep], arguments[1], None, targets[keep], *arguments[4:]]
    outputs_part = [o[keep] for o in outputs[:4]]
    dx_part, dw_part, _ = backward(part, outputs_part, [g[keep] for g in grads])
    assert torch.equal(dx[keep], dx_part)
    assert bool((dx[~keep] == 0).all())
    assert torch.equal(dw, dw_part)
    hidden[~keep] = math.nan
    assert all(torch.equal(*pair) for pair in zip(backward(arguments, outputs, grads), (dx, dw, dx.new_empty(0))))
    nothing = backward(arguments, outputs, [g * 0 for g in grads])
    assert all(bool((g == 0).all()) for g in nothing)


def test_top_logits_and_their_order_among_equals():
    arguments = problem(30, 16, 70, "everything")
    values, ids = linear_logprob(*arguments, 5)[4:]
    hidden, weight, bias, _, heat, scale, softcap = arguments
    z = torch.tanh((hidden @ weight.T + bias) * scale / softcap) * softcap / heat[:, None].float()
    order = torch.sort(z, descending=True, stable=True)
    torch.testing.assert_close(values, order.values[:, :5], rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, order.indices[:, :5])
    tied = torch.tensor([[0.0, -0.0, 2.0, -1.5, 2.0, -math.inf, -1.5, math.inf, math.nan]])
    values, ids = largest(tied, 9)
    assert ids.tolist() == [[8, 7, 2, 4, 0, 1, 3, 6, 5]]
    assert values[0, 0].isnan()
    assert torch.equal(values[0, 1:], tied[0, ids[0, 1:]])


def test_extreme_logits():
    """Identity weights put the logits in the test's hand."""
    rows = torch.zeros(5, 64)
    rows[0, 3] = 1e30
    rows[1] = -math.inf
    rows[1, 40] = 2.0
    rows[2] = -math.inf
    rows[3, 50] = math.nan
    rows[4] = -1e30
    weight, targets = torch.eye(64), torch.tensor([[3], [40], [0], [1], [63]])
    rows = torch.nan_to_num(rows, nan=math.nan, neginf=-3e38)  # 0 * inf would be NaN in the product
    bias = torch.zeros(64)
    logprob, lse, entropy, _, _, _ = linear_logprob(rows, weight, bias, targets, None, 1.0, 0.0, 0)
    assert torch.equal(logprob[[0, 1], 0], torch.zeros(2))
    assert torch.equal(lse[:2], torch.tensor([1e30, 2.0]))
    assert torch.equal(entropy[:2], torch.zeros(2))
    torch.testing.assert_close(logprob[4, 0], torch.tensor(-math.log(64)))
    torch.testing.assert_close(entropy[4], torch.tensor(math.log(64)))
    assert bool(lse[3].isnan())
    # Minus infinity itself, from the bias: tokens that are not allowed.
    bias[:40] = -math.inf
    rows, targets = torch.randn(3, 64), torch.tensor([[40], [3], [63]])
    arguments = [rows, weight, bias, targets, None, 1.0, 0.0]
    outputs = linear_logprob(*arguments, 0)
    expected = dense(*(t.double() for t in (rows[:, 40:], weight[40:, 40:])), None, targets - 40, None, 1.0, 0.0)
    assert_near(outputs[0][[0, 2]], expected[0][[0, 2]], 2e-6)
    assert outputs[0][1, 0] == -math.inf
    assert_near(outputs[1], expected[1], 2e-6)
    assert_near(outputs[2], expected[2], 2e-6)
    zero = torch.zeros(3)
    dx, _, _ = backward(arguments, outputs, [torch.ones(3, 1), zero, torch.ones(3), zero])
    assert bool(dx[[0, 2]].isfinite().all())


def test_strides_far_rows_and_targets_beyond_the_vocabulary():
    arguments = problem(3, 16, 40, dtype=torch.float16)
    arguments[3] = torch.tensor([[1], [40], [-5]])
    outputs = linear_logprob(*arguments, 2)
    assert bool(outputs[0][1].isnan())
    assert outputs[0][2] == 0
    grads = cotangents(3, 1)
    gradients = backward(arguments, outputs, grads)
    memory = torch.empty(2 * (1 << 30) + 64, dtype=torch.float16)  # reserved, touched in three rows only
    far = [memory.as_strided((3, 16), (1 << 30, 1)).copy_(arguments[0]), arguments[1].t().contiguous().t()]
    again = linear_logprob(*far, *arguments[2:], 2)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(again, outputs))
    assert all(torch.equal(*pair) for pair in zip(backward(far + arguments[2:], outputs, grads), gradients))


def test_bad_input_is_one_sentence():
    hidden, weight, _, targets, heat, scale, softcap = problem(3, 16, 40)
    for arguments, words in [
        ((hidden.double(), weight.double(), None), "float64"),
        ((hidden, weight.half(), None), "must be equal"),
        ((hidden[:, :3], weight, None), r"hidden \[3, 3\] and weight \[40, 16\]"),
        ((hidden, weight, torch.zeros(3)), r"bias \[3\]"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            linear_logprob(*arguments, targets, heat, scale, softcap, 0)
