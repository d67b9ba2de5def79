"""Triton activations, plain and gated, in Triton's interpreter against fp64."""

import math
import textwrap

import pytest
import torch

from tests.helpers.interpreter import DTYPES, TOLERANCE, close, far_apart, gradients, noise, poisoned, rows_alone
from toolkit.errors import ToolkitError
from toolkit.ops.activation import activation, kinds
from toolkit.ops.activation.triton import activation_backward
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.gated_activation.triton import gated_activation_backward

PLAIN = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * torch.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: torch.sinh(x) / torch.cosh(x),
    "softplus": lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x))),
}


def clamped_swiglu(gate, up):
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


GATES = {kind: (lambda g, u, f=f: f(g) * u) for kind, f in PLAIN.items()} | {"clamped_swiglu": clamped_swiglu}
SHAPES = [(3, 7), (2, 3, 60), (2, 1030), (0, 16), (4, 0), (1, 1), (9,)]


def test_every_kind_has_an_oracle():
    assert set(kinds.KINDS) == set(GATES)
    assert kinds.plain_kinds() == sorted(PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PLAIN)
def test_plain(kind, dtype):
    for shape in SHAPES:
        x, grad = noise(*shape, dtype=dtype, scale=3.0), noise(*shape, dtype=dtype, seed=1)
        with poisoned():
            y, dx = activation(x, kind, impl="triton"), activation_backward(grad, x, kind)
        assert y.dtype == dx.dtype == dtype
        close(y, PLAIN[kind](x.double()), TOLERANCE[dtype])
        close(dx, gradients(PLAIN[kind], [x], [grad])[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
def test_gated(kind, dtype):
    for shape in SHAPES:
        gate, up, grad = (noise(*shape, dtype=dtype, scale=s, seed=i) for i, s in enumerate((4.0, 4.0, 1.0)))
        with poisoned():
            y = gated_activation(gate, up, kind, impl="triton")
            grads = gated_activation_backward(grad, gate, up, kind)
        close(y, GATES[kind](gate.double(), up.double()), TOLERANCE[dtype])
        for got, wanted in zip(grads, gradients(GATES[kind], [gate, up], [grad])):
            assert got.dtype == dtype
            close(got, wanted, TOLERANCE[dtype])


def test_a_scalar():
    x = torch.tensor(0.7)
    close(activation(x, "silu", impl="triton"), PLAIN["silu"](x.double()), 1e-6)
    close(activation_backward(x, x, "relu2"), torch.tensor(0.98), 1e-6)


@pytest.mark.parametrize("kind", PLAIN)
def test_lower_tail_keeps_its_relative_precision(kind):
    x = torch.linspace(-9, -1, 300)
    y, wanted = activation(x, kind, impl="triton").double(), PLAIN[kind](x.double())
    if kind == "gelu_tanh":  # written so that it does not cancel; tanh itself does
        wanted = x.double() * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3))
    # A rounding of an argument of exp of up to n makes n half units in the last place: gelu_tanh has four of them.
    units = 4 * 70 if kind == "gelu_tanh" else 76
    assert ((y - wanted).abs() <= units * 2**-24 * wanted.abs() + 1e-45).all()


@pytest.mark.parametrize("kind", PLAIN)
def test_limits_are_exact_and_nan_stays(kind):
    x = torch.tensor([-math.inf, -3.4e38, -1e4, -200.0, 200.0, 1e4, 3.4e38, math.inf, math.nan])
    y, slope = activation(x, kind, impl="triton"), activation_backward(torch.ones_like(x), x, kind)
    positive = x[:8] > 0
    expected = torch.where(positive, x[:8] * x[:8] if kind == "relu2" else x[:8], 0)
    if kind in ("sigmoid", "tanh"):
        expected = positive.float() if kind == "sigmoid" else x[:8].sign()
    assert torch.allclose(y[:8], expected, rtol=1e-6, atol=1e-80)
    slopes = 2 * x[:8].clamp_min(0) if kind == "relu2" else positive.float() * (kind not in ("sigmoid", "tanh"))
    assert torch.allclose(slope[:8], slopes, rtol=0, atol=1e-37 if kind == "tanh" else 1e-80)
    assert y[8].isnan()
    assert slope[8].isnan() or kind == "relu"


def test_limits_of_the_clamped_gate():
    gate = torch.tensor([-math.inf, -3e38, 7.0, 7.1, math.inf, 1.0, 1.0, math.nan, 1.0])
    up = torch.tensor([1.0, 1.0, 7.0, 7.1, math.inf, -math.inf, -7.0, 1.0, math.nan])
    y = gated_activation(gate, up, "clamped_swiglu", impl="triton")
    to_gate, to_up = gated_activation_backward(torch.ones(9), gate, up, "clamped_swiglu")
    assert y[:2].tolist() == to_gate[:2].tolist() == to_up[:2].tolist() == [0.0, 0.0]
    assert y[2] == y[3] == y[4]
    assert to_gate[[3, 4]].tolist() == [0.0, 0.0]
    assert to_up[[3, 4, 5]].tolist() == [0.0, 0.0, 0.0]
    assert (to_gate[2] != 0) & (to_up[2] != 0) & (to_up[6] != 0)
    assert y[7:].isnan().all()
    assert to_gate[7:].isnan().all()


def test_strided_inputs():
    both = noise(3, 5, 40, dtype=torch.float16)
    gate, up = both.chunk(2, dim=-1)
    for g, u in ((gate, up), (gate[:, ::2], up[:, ::2]), (gate[..., ::2], up[..., ::2]), (both.mT, both.mT + 1)):
        assert torch.equal(
            gated_activation(g, u, "clamped_swiglu", impl="triton"),
            gated_activation(g.contiguous(), u.contiguous(), "clamped_swiglu", impl="triton"),
        )
        expected = activation(g.contiguous(), "gelu", impl="triton")
        assert torch.equal(activation(g, "gelu", impl="triton"), expected)
    grad = noise(1, 1, 1).expand(3, 5, 20)
    got = gated_activation_backward(grad, gate, up, "silu")
    wanted = gated_activation_backward(grad.contiguous(), gate.contiguous(), up.contiguous(), "silu")
    assert all(map(torch.equal, got, wanted))


def test_rows_do_not_depend_on_other_rows():
    for width in (1, 60, 1030):
        inputs = [noise(13, width, seed=seed) for seed in range(3)]
        rows_alone(lambda g, u: gated_activation(g, u, "gelu", impl="triton"), inputs[:2])
        rows_alone(lambda *t: gated_activation_backward(*t, "clamped_swiglu"), inputs)
        rows_alone(lambda x: activation(x, "gelu_tanh", impl="triton"), inputs[:1])


def test_offsets_past_two_to_the_31():
    gate, up, grad = (noise(4, 40, dtype=torch.float16, seed=seed) for seed in range(3))
    far = far_apart(gate)
    assert torch.equal(activation(far, "silu", impl="triton"), activation(gate, "silu", impl="triton"))
    assert torch.equal(activation_backward(far, up, "silu"), activation_backward(gate, up, "silu"))
    got, wanted = (gated_activation_backward(grad, g, up, "clamped_swiglu") for g in (far, gate))
    assert all(map(torch.equal, got, wanted))


def test_bad_input_is_one_sentence():
    x = torch.ones(2, 4)
    with pytest.raises(
        ToolkitError, match="kind is 'clamped_swiglu'; allowed are gelu, gelu_tanh, relu, relu2, sigmoid, silu"
    ):
        activation(x, "clamped_swiglu", impl="triton")
    with pytest.raises(ToolkitError, match=r"activation got dtype torch\.float64"):
        activation(x.double(), "silu", impl="triton")


def test_a_new_kind_is_one_file(tmp_path, monkeypatch):
    """mish: x tanh(log(1 + e^x)), and a gate of two arguments."""
    (tmp_path / "mish.py").write_text(textwrap.dedent(MISH))
    (tmp_path / "bilinear.py").write_text(textwrap.dedent(BILINEAR))
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    kinds.discover()
    try:
        x, up, grad = (noise(5, 40, scale=2.0, seed=seed) for seed in range(3))
        mish = torch.nn.functional.mish
        close(activation(x, "mish", impl="triton"), mish(x.double()), 1e-6)
        close(activation_backward(grad, x, "mish"), gradients(mish, [x], [grad])[0], 1e-6)
        close(gated_activation(x, up, "mish", impl="triton"), mish(x.double()) * up.double(), 1e-6)
        close(activation(x, "mish", impl="reference"), mish(x.double()), 1e-6)
        assert torch.equal(gated_activation(x, up, "bilinear", impl="triton"), x * up)
        assert all(map(torch.equal, gated_activation_backward(grad, x, up, "bilinear"), (grad * up, grad * x)))
        with pytest.raises(ToolkitError, match="kind is 'bilinear'"):
            activation(x, "bilinear", impl="triton")
    finally:
        monkeypatch.undo()
        kinds.discover()
    assert "mish" not in kinds.KINDS


MISH = """
    from typing import TYPE_CHECKING

    import torch.nn.functional as F

    if TYPE_CHECKING:
        import triton.language as tl

        from toolkit.ops.activation.triton_functions import sigmoid

    def value(x):
        return F.mish(x)

    def triton_value(x):
        e = tl.exp(-tl.abs(x))  # tanh(log(1 + e^x)) without overflow, in both signs
        n = tl.where(x > 0, 1.0 + 2.0 * e, e * e + 2.0 * e)
        return x * n / tl.where(x > 0, n + 2.0 * e * e, n + 2.0)

    def triton_both(x):
        t = tl.where(x == 0.0, 0.6, triton_value(x) / x)
        return x * t, t + x * sigmoid(x) * (1.0 - t * t)

    def derivative(x):
        t = F.softplus(x).tanh()
        return t + x * x.sigmoid() * (1 - t * t)

    CPU = ""
"""
BILINEAR = """
    def value(gate, up):
        return gate * up

    def derivative(gate, up):
        return up, gate

    def triton_value(gate, up):
        return gate * up

    def triton_both(gate, up):
        return gate * up, up, gate

    CPU = ""
"""
