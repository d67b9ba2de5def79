"""Deferred logits: a tensor to everybody, hidden states to a loss that knows them."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.modules.elementwise import row_invariant
from toolkit.ops.linear import linear
from toolkit.ops.linear_logprob import deferred
from toolkit.ops.linear_logprob.deferred import DeferredLogits, token_logprobs, token_statistics


def parts(bias: bool = True, dtype: torch.dtype = torch.float32):
    """hidden, weight and bias."""
    tensors = [seeded(2, 5, 8, dtype=dtype), seeded(32, 8, dtype=dtype, seed=1)]
    tensors.append(seeded(32, dtype=dtype, seed=2)) if bias else None
    return [x.requires_grad_() for x in tensors]


def waiting(leaves) -> DeferredLogits:
    return DeferredLogits(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None)


@pytest.fixture
def no_logits(monkeypatch):
    """Fails a test that computes the logits."""

    def compute(self):
        raise AssertionError("the logits were computed")

    monkeypatch.setattr(DeferredLogits, "compute", compute)


# What models do between their head and their loss.
STEPS = {
    "nothing": lambda z: z,
    "scale": lambda z: z * 0.0625,
    "scale from the left": lambda z: 0.0625 * z,
    "division": lambda z: z / 7.0,
    "soft cap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "all": lambda z: torch.tanh((z * 0.5) / 3.0).mul(3.0) / 1.3,
    "rows": lambda z: z[:, 1:, :],
    "contiguous rows": lambda z: z[..., :-1, :].contiguous().float(),
    "one": lambda z: z[0],
    "chosen": lambda z: z[0][torch.tensor([3, 1, 1])],
    "masked": lambda z: z[torch.tensor([[True, False, True, False, False], [False, True, True, True, True]])],
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_models_stay_deferred_with_the_same_bits(name, no_logits):
    leaves = parts()
    late = STEPS[name](waiting(leaves))
    assert isinstance(late, DeferredLogits)
    with row_invariant():  # torch's tanh has other bits on some machines
        dense = STEPS[name](linear(*leaves))
    assert late.shape == dense.shape
    assert late.dtype == dense.dtype
    assert late.device == dense.device
    assert late.dim() == dense.dim()
    assert late.numel() == dense.numel()
    assert late.requires_grad
    targets = torch.arange(dense.shape[:-1].numel()).view(dense.shape[:-1])
    targets = torch.where(targets == 0, -100, targets)
    for ours, exact in zip(token_logprobs(late, targets), token_logprobs(dense, targets)):
        assert torch.equal(ours, exact)
    for ours, exact in zip(token_statistics(late, targets), token_statistics(dense, targets)):
        torch.testing.assert_close(ours, exact, rtol=2e-6, atol=2e-6)
    weights = seeded(*targets.shape, dtype=torch.float32, seed=5)
    wanted = torch.autograd.grad((token_logprobs(dense, targets)[0] * weights).sum(), leaves)
    got = torch.autograd.grad((token_logprobs(late, targets)[0] * weights).sum(), leaves)
    for ours, exact in zip(got, wanted):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda z: z.argmax(-1),
        lambda z: z[..., 0],
        lambda z: z[:, :, torch.tensor([1, 2])],
        lambda z: z[None],
        lambda z: z * torch.arange(32.0),
        lambda z: torch.log_softmax(z, -1),
        lambda z: F.cross_entropy(z.view(-1, 32), torch.arange(10)),
        lambda z: torch.cat([z, z]),
        lambda z: z.detach().clone(),
        lambda z: z.sin() + 1,
        lambda z: torch.tanh(z) * 2,
        lambda z: z.double(),
    ],
)
def test_anything_else_computes_the_logits(use):
    leaves = parts()
    got = use(waiting(leaves))
    with row_invariant():
        wanted = use(linear(*leaves))
    if isinstance(got, DeferredLogits):  # steps that are no soft cap are still only noted down
        assert got.scale_softcap_temperature() is None
        got = got.compute()
    assert type(got) is torch.Tensor
    assert torch.equal(got, wanted)
    if wanted.requires_grad:
        ours, exact = (torch.autograd.grad(x.sum(), leaves) for x in (got, wanted))
        assert all(map(torch.equal, ours, exact))


def test_steps_that_are_no_soft_cap_take_the_logits():
    leaves = parts()
    targets = torch.arange(10).view(2, 5)
    for step in (lambda z: torch.tanh(z / 3.0) * 2.0, lambda z: torch.tanh(z), lambda z: z * 2.0 * 2.0):
        got, wanted = token_logprobs(step(waiting(leaves)), targets), token_logprobs(step(linear(*leaves)), targets)
        assert all(map(torch.equal, got, wanted))


def test_computed_once():
    late = waiting(parts())
    assert late.compute() is late.compute()
    assert token_logprobs(late, torch.zeros(2, 5, dtype=torch.int64))[0].shape == (2, 5)


def test_entropy_of_tokens_that_float32_gives_no_probability():
    """Value and gradient, dense and deferred, against float64."""
    hidden = torch.tensor([[0.0, 200.0, 199.0, -30.0]])
    targets, grads = torch.tensor([1]), []
    exact = hidden.double().requires_grad_()
    log_p = exact.log_softmax(-1)
    wanted = -(log_p.exp() * log_p).sum()
    for make in (lambda x: DeferredLogits(x, torch.eye(4), None), lambda x: x * 1.0):
        leaf = hidden.clone().requires_grad_()
        entropy = token_statistics(make(leaf), targets)[2]
        torch.testing.assert_close(entropy[0].double(), wanted, rtol=1e-5, atol=1e-6)
        grads.append(torch.autograd.grad(entropy.sum(), leaf)[0])
    for gradient in grads:
        torch.testing.assert_close(
            gradient.double(), torch.autograd.grad(wanted, exact, retain_graph=True)[0], rtol=1e-4, atol=1e-6
        )


def test_past_the_python_level():
    """What C++ does with the tensor (collectives, copies) sees the logits too."""
    leaves = parts()
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.ops.aten.add.Tensor(waiting(leaves), 1.0), linear(*leaves) + 1.0)
    with torch.no_grad():
        target = torch.empty(2, 5, 32)
        target.copy_(waiting(leaves))
        assert torch.equal(target, linear(*leaves))


def test_repr_computes_nothing(no_logits):
    assert repr(waiting(parts())) == "DeferredLogits(shape=[2, 5, 32], dtype=torch.float32)"
    assert deferred.DeferredLogits is DeferredLogits


def test_a_look_without_gradients_keeps_them_for_the_loss():
    for quiet in (torch.no_grad, torch.inference_mode):
        leaves = parts()
        late = waiting(leaves)
        with quiet():
            seen = late.argmax(-1)
        assert torch.equal(seen, linear(*leaves).argmax(-1))
        got = torch.autograd.grad(late.square().sum(), leaves)
        wanted = torch.autograd.grad(linear(*leaves).square().sum(), leaves)
        assert all(map(torch.equal, got, wanted))


def test_logits_of_weights_that_changed_raise():
    leaves = parts()
    late, read = waiting(leaves), waiting(leaves)
    read.argmax(-1)
    with torch.no_grad():
        leaves[1].add_(1.0)
    with pytest.raises(ToolkitError, match="not read before the weights changed"):
        late.argmax(-1)
    with pytest.raises(ToolkitError, match="not read before the weights changed"):
        token_logprobs(late, torch.zeros(2, 5, dtype=torch.int64))
    assert read.shape == (2, 5, 32)
    read.argmax(-1)  # computed in time


WRITES = {
    "in place": lambda weight: weight.detach().add_(1.0),
    "past the counters": lambda weight: weight.data.copy_(weight.detach() + 1.0),
    "other memory": lambda weight: setattr(weight, "data", weight.detach() + 1.0),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_step_after_the_weights_changed_does_not_hide_it(kind):
    leaves = parts()
    late = waiting(leaves)
    WRITES[kind](leaves[1])
    for step in (lambda z: z / 2.0, lambda z: z[:, :-1], lambda z: deferred.take_logits(z, torch.tensor([0]))):
        with pytest.raises(ToolkitError, match="not read before the weights changed"):
            step(late)


class Squares(torch.autograd.Function):
    """A loss of somebody else's that autograd sees as one node."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits * 1.0)
        return logits.square().sum()

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return 2.0 * grad * logits


@pytest.mark.parametrize("step", [lambda z: z, lambda z: (z / 2.0)[:, 1:]])
def test_custom_functions_pass_their_gradient(step):
    ours, stock = parts(), parts()
    Squares.apply(step(waiting(ours))).backward()
    step(linear(*stock)).square().sum().backward()
    for got, wanted in zip(ours, stock):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-6, atol=1e-6)


def test_several_targets_a_row_of_dense_logits() -> None:
    """As a head gives them whose weight is sharded: log-probabilities of K tokens a row, and their gradient."""
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (5, 3))
    weights = torch.randn(5, 3, dtype=torch.float64)
    logprobs, lse = token_logprobs(logits, targets)
    (gradient,) = torch.autograd.grad((logprobs * weights).sum() + lse.square().sum(), logits)
    expected = logits.log_softmax(-1).gather(1, targets)
    wanted = (expected * weights).sum() + logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logits)[0], rtol=1e-10, atol=1e-12)
