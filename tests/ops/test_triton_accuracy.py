"""Tighter bounds of Triton kernels than those of all implementations: row-wise ops and final states."""

import pytest
import torch

from tests.helpers.implementations import TRITON, impl_and_dtype, only_triton
from tests.helpers.interpreter import TOLERANCE, close, gradients
from tests.helpers.recurrence import inputs, tensors, unshared
from tests.helpers.rowwise import check_oracle, seeded
from tests.ops.test_activation import GATES, ORACLES, PLAIN
from tests.ops.test_linear_recurrence import TREES
from tests.ops.test_rms_norm import EPS, SHAPES, oracle
from toolkit.ops.activation import activation
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.linear_recurrence import linear_recurrence
from toolkit.ops.rms_norm import add_rms_norm, rms_norm
from toolkit.ops.rotary import rotary

ROTARY_SHAPES = [(1, 1, 2, 2), (5, 3, 64, 64), (7, 2, 60, 30), (3, 1, 13, 6), (0, 2, 8, 8), (4, 2, 8, 0), (3, 0, 8, 8)]
ACTIVATION_SHAPES = [(3, 7), (2, 3, 60), (2, 1030), (0, 16), (4, 0), (1, 1), (9,)]


@impl_and_dtype(implementations=[TRITON])
@pytest.mark.parametrize("kind", GATES)
def test_activations_and_their_gradients_to_one_rounding(impl, dtype, kind):
    bound = TOLERANCE[dtype], TOLERANCE[dtype]
    for shape in ACTIVATION_SHAPES:
        x, gate, up = (seeded(*shape, dtype=dtype, scale=scale, seed=i) for i, scale in enumerate((3.0, 4.0, 4.0)))
        if kind in PLAIN:
            check_oracle(lambda x: activation(x, kind), ORACLES[kind], [x], bound, dtype)
        check_oracle(lambda g, u: gated_activation(g, u, kind), GATES[kind], [gate, up], bound, dtype)


@impl_and_dtype(implementations=[TRITON])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_bitwise_identical_to_the_reference(impl, dtype, interleaved):
    for tokens, heads, width, rotated in ROTARY_SHAPES:
        x = seeded(tokens, heads, width, dtype=dtype)
        cos, sin = (seeded(tokens, rotated, dtype=torch.float32, seed=seed) for seed in (1, 2))
        y = rotary(x, cos, sin, interleaved)
        assert y.dtype == dtype
        assert torch.equal(y.cpu(), rotary(x.cpu(), cos.cpu(), sin.cpu(), interleaved, impl="reference"))


@impl_and_dtype(implementations=[TRITON])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_of_rows_of_one_element(impl, dtype, offset):
    """The gradient to x is what cancellation leaves there; the output and the gradient of the weight are not."""
    for shape in [(1, 1), (5, 1)]:
        x, weight, grad = (seeded(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape[-1:], shape)))
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        y = rms_norm(*leaves, EPS, offset)
        (dweight,) = torch.autograd.grad(y, [weight], grad)
        assert y.dtype == dweight.dtype == dtype
        close(y, oracle(x.double(), weight.double(), offset), TOLERANCE[dtype])
        wanted = gradients(lambda x, w: oracle(x, w, offset), [x.detach(), weight.detach()], [grad])
        close(dweight, wanted[1], 2 * TOLERANCE[dtype])


@impl_and_dtype(implementations=[TRITON])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_gradient_of_a_fused_sum(impl, dtype, weighted):
    """Against the oracle at the rounded sum, which is what the backward reads."""
    backward = torch.ops.toolkit.add_rms_norm_backward
    for shape in SHAPES:
        x, residual, grad, grad_sum = (seeded(*shape, dtype=dtype, seed=seed) for seed in range(4))
        weight = seeded(shape[-1], dtype=dtype, seed=5) if weighted else None
        y, total = add_rms_norm(x, residual, weight, EPS, 1.0)
        dx, dweight = backward(grad, grad_sum, total, weight, EPS, 1.0)
        assert y.dtype == total.dtype == dx.dtype == dtype
        assert torch.equal(total, x + residual)
        alone, same = torch.ops.toolkit.rms_norm_backward(grad, total, weight, EPS, 1.0)
        assert torch.equal(dweight, same)
        assert weighted or dweight.numel() == 0
        if dtype == torch.float32:
            assert torch.equal(dx, alone + grad_sum)
        given = [total] if weight is None else [total, weight]
        wanted = gradients(lambda *t: (oracle(*t, *([1.0] * weighted)), t[0]), given, [grad, grad_sum])
        if shape[-1] > 1:
            close(dx, wanted[0], 2 * TOLERANCE[dtype])


@only_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("delta", [True, False])
def test_final_states_of_the_recurrence_are_float32(impl, dtype, delta):
    given = inputs(31, 1, 2, 5, 19, dtype)
    initial = seeded(2, 2, 5, 19, dtype=torch.float32, seed=9)
    out, finals, _ = torch.ops.toolkit.linear_recurrence(*given, *tensors(TREES), initial, 0.3, delta, False)
    wanted = unshared(*(x.double() for x in given), initial.double(), TREES, 0.3, delta)
    assert out.dtype == dtype
    assert torch.equal(out, linear_recurrence(*given, *tensors(TREES), initial, 0.3, delta)[0])
    close(out, wanted[0], TOLERANCE[dtype])
    close(finals, wanted[1], 1e-6)
