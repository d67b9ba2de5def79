"""Plain and gated activations."""

import math
import runpy
import textwrap
from pathlib import Path

import pytest
import setuptools
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.implementations import NATIVE, TRITON, impl_and_dtype, impl_dtype_and, implementations, only_triton
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import check_oracle, check_repeatable, check_rows, error, run, seeded
from toolkit.errors import ToolkitError
from toolkit.ops.activation import KINDS, activation, kinds, plain_kinds
from toolkit.ops.gated_activation import gated_activation

ORACLES = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: torch.sinh(x) / torch.cosh(x),
    "softplus": lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x))),
}


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


GATES = {kind: (lambda g, u, f=f: f(g) * u) for kind, f in ORACLES.items()} | {"clamped_swiglu": clamped_swiglu}
PLAIN = plain_kinds()
SOME = ("gelu_tanh", "clamped_swiglu")  # of the fast level where the interpreter would repeat a test for every kind
SHAPES = [(1, 1), (3, 7), (5, 60), (3, 513), (2, 3, 64), (0, 16), (4, 0), (9,), (2, 1030)]


def test_every_kind_has_an_oracle():
    assert set(KINDS) == set(GATES)
    assert set(PLAIN) == set(ORACLES)


@impl_and_dtype()
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(impl, dtype, kind):
    for shape in SHAPES:
        x, up = seeded(*shape, dtype=dtype, scale=2.0), seeded(*shape, dtype=dtype, seed=1)
        if kind in PLAIN:
            check_oracle(lambda x: activation(x, kind, impl=impl.option), ORACLES[kind], [x], None, dtype)
        else:
            x, up = 3 * x, 4 * up  # past the limits
        check_oracle(lambda g, u: gated_activation(g, u, kind, impl=impl.option), GATES[kind], [x, up], None, dtype)


@impl_and_dtype([torch.float32, torch.float64])
def test_limits_of_the_clamped_gate(impl, dtype):
    inf, nan, low = math.inf, math.nan, torch.finfo(dtype).min
    gate = torch.tensor([-inf, low, 7.0, 7.1, inf, 1.0, 1.0, nan, 1.0], dtype=dtype)
    up = torch.tensor([1.0, 1.0, 7.0, 7.1, inf, -inf, -7.0, 1.0, nan], dtype=dtype)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    y = gated_activation(*leaves, "clamped_swiglu", impl=impl.option)
    to_gate, to_up = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert y[:2].tolist() == to_gate[:2].tolist() == to_up[:2].tolist() == [0.0, 0.0]
    assert y[2] == y[3] == y[4]
    assert to_gate[[3, 4]].tolist() == [0.0, 0.0]
    assert to_up[[3, 4, 5]].tolist() == [0.0, 0.0, 0.0]
    assert to_gate[2] * to_up[2] * to_up[6] != 0
    assert y[7:].isnan().all()
    assert to_gate[7:].isnan().all()


def test_a_scalar_has_an_activation(impl):
    for kind in ("silu", "relu2"):
        check_oracle(lambda x, kind=kind: activation(x, kind, impl=impl.option), ORACLES[kind], [torch.tensor(0.7)])


def limits(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A kind's value and slope far from 0."""
    if kind in ("sigmoid", "tanh"):
        return (x > 0).to(x.dtype) if kind == "sigmoid" else x.sign(), torch.zeros_like(x)
    if kind == "relu2":
        return torch.where(x > 0, x * x, 0), 2 * x.clamp_min(0)
    return torch.where(x > 0, x, 0), (x > 0).to(x.dtype)


@impl_and_dtype([torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", PLAIN)
def test_limits_are_exact_in_value_and_gradient(impl, dtype, kind):
    far = [-math.inf, torch.finfo(dtype).min, -1e4, -200.0, 200.0, 1e4, torch.finfo(dtype).max, math.inf]
    x = torch.tensor(far, dtype=dtype, requires_grad=True)
    y = activation(x, kind, impl=impl.option)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected, slopes = limits(kind, x.detach())
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-80)
    # In float32 a sigmoid's own tail ends at e^-86.
    tail = 2e-37 if kind in ("sigmoid", "tanh") and dtype == torch.float32 else 1e-80
    assert torch.allclose(slope, slopes, rtol=0, atol=tail)
    up = torch.full_like(x, 2.0).requires_grad_()
    _, (of_gate, of_up) = run(lambda g, u: gated_activation(g, u, kind, impl=impl.option), [x, up])
    weight = seeded(*x.shape, dtype=dtype, seed=7)
    assert torch.allclose(of_gate, 2 * weight * slope, rtol=2e-3, atol=1e-80)
    assert torch.allclose(of_up, weight * y.detach(), rtol=2e-3, atol=1e-80)


@pytest.mark.parametrize("kind", PLAIN)
def test_nan_stays_with_its_element(impl, kind):
    x = seeded(40, dtype=torch.float32)
    x[17] = torch.nan
    y, (slope,) = run(lambda x: activation(x, kind, impl=impl.option), [x])
    others = torch.arange(40) != 17
    assert y[0][17].isnan()
    assert y[0][others].isfinite().all()
    assert slope[others].isfinite().all()
    assert slope[17].isnan() or kind == "relu"


@impl_dtype_and("kind", KINDS, SOME, [torch.float32, torch.float64])
def test_rows_do_not_depend_on_other_rows(impl, kind, dtype):
    # The reference's functions are torch's own, which begin to use two threads at 32,768 numbers.
    widest = (41, 2049) if impl is NATIVE else (33, 1030)
    for rows, width in ((70, 1), (70, 60), widest) if impl is not TRITON else ((13, 1), (13, 60), (13, 1030)):
        x, up = seeded(rows, width, dtype=dtype, scale=3.0), seeded(rows, width, dtype=dtype, seed=1)
        if kind in PLAIN:
            check_rows(lambda x: activation(x, kind, impl=impl.option), [x])
        check_rows(lambda g, u: gated_activation(g, u, kind, impl=impl.option), [x, up])


@pytest.mark.parametrize("kind", PLAIN)
def test_an_element_has_the_same_bits_anywhere(impl, kind):
    x = seeded(60, dtype=torch.float32, scale=3.0)
    indices = torch.stack([torch.cat([torch.zeros(n), x, torch.zeros(40 - n)]) for n in range(40)])
    y = activation(indices, kind, impl=impl.option)
    for n in range(40):
        assert torch.equal(y[n, n : n + 60], y[0, :60])


def test_strided_inputs(impl):
    both = seeded(3, 5, 40, dtype=torch.float32)
    gate, up = both.chunk(2, dim=-1)
    for g, u in (
        (gate, up),
        (gate[:, ::2], up[:, ::2]),
        (gate[..., ::2], up[..., ::2]),
        (both.mT, both.mT + 1),
    ):
        y, grads = run(lambda g, u: gated_activation(g, u, "silu", impl=impl.option), [g, u])
        z, expected = run(lambda g, u: gated_activation(g, u, "silu"), [g.contiguous(), u.contiguous()])
        assert y[0].is_contiguous()
        assert max(map(error, [*y, *grads], [*z, *expected])) < 1e-6
        y, grads = run(lambda g: activation(g, "gelu", impl=impl.option), [g])
        z, expected = run(lambda g: activation(g, "gelu"), [g.contiguous()])
        assert y[0].is_contiguous()
        assert max(map(error, [*y, *grads], [*z, *expected])) < 1e-6


@implementations(NATIVE, TRITON)
def test_gradient_rows_do_not_depend_on_other_rows(impl):
    for width in (1, 60, 1030):
        inputs = [seeded(13, width, dtype=torch.float32, scale=3.0, seed=seed) for seed in range(3)]
        check_rows(lambda *t: torch.ops.toolkit.gated_activation_backward(*t, "clamped_swiglu"), inputs)
        check_rows(lambda *t: torch.ops.toolkit.activation_backward(*t, "gelu_tanh"), inputs[:2])


@only_triton
@pytest.mark.parametrize("kind", PLAIN)
def test_lower_tail_keeps_its_relative_precision(impl, kind):
    x = torch.linspace(-9, -1, 300)
    y, wanted = activation(x, kind).double(), ORACLES[kind](x.double())
    if kind == "gelu":  # the definition by erf cancels
        wanted = x.double() * torch.erfc(-x.double() / math.sqrt(2)) / 2
    if kind == "gelu_tanh":  # written so that it does not cancel; tanh itself does
        wanted = x.double() * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3))
    # A rounding of an argument of exp of up to n makes n half units in the last place: gelu_tanh has four of them.
    units = 4 * 70 if kind == "gelu_tanh" else 76
    assert ((y - wanted).abs() <= units * 2**-24 * wanted.abs() + 1e-45).all()


@implementations(NATIVE, TRITON)
def test_strides_do_not_matter(impl):
    both = seeded(3, 5, 40, dtype=torch.float16)
    gate, up = both.chunk(2, dim=-1)
    for g, u in ((gate, up), (gate[:, ::2], up[:, ::2]), (gate[..., ::2], up[..., ::2]), (both.mT, both.mT + 1)):
        wanted = gated_activation(g.contiguous(), u.contiguous(), "clamped_swiglu")
        assert torch.equal(gated_activation(g, u, "clamped_swiglu"), wanted)
        assert torch.equal(activation(g, "gelu"), activation(g.contiguous(), "gelu"))
    grad, op = seeded(1, 1, 1, dtype=torch.float16).expand(3, 5, 20), torch.ops.toolkit.gated_activation_backward
    got, wanted = op(grad, gate, up, "silu"), op(grad.contiguous(), gate.contiguous(), up.contiguous(), "silu")
    assert all(map(torch.equal, got, wanted))


@implementations(NATIVE, TRITON)
def test_offsets_past_two_to_the_31(impl):
    gate, up, grad = (seeded(4, 40, dtype=torch.float16, seed=seed) for seed in range(3))
    far, op = far_apart(gate), torch.ops.toolkit
    assert torch.equal(activation(far, "silu"), activation(gate, "silu"))
    assert torch.equal(op.activation_backward(far, up, "silu"), op.activation_backward(gate, up, "silu"))
    got, wanted = (op.gated_activation_backward(grad, g, up, "clamped_swiglu") for g in (far, gate))
    assert all(map(torch.equal, got, wanted))


def test_strided_gate_has_the_bits_of_a_contiguous_one():
    gate, up = seeded(7, 120, dtype=torch.float32).chunk(2, dim=-1)
    expected = gated_activation(gate.contiguous(), up.contiguous(), "gelu_tanh")
    assert torch.equal(gated_activation(gate, up, "gelu_tanh"), expected)


def test_every_run_and_number_of_threads_gives_the_same_gradients():
    inputs = [seeded(300, 513, dtype=torch.float32, seed=seed) for seed in (0, 1)]
    check_repeatable(lambda g, u: gated_activation(g, u, "silu"), inputs)


@pytest.mark.parametrize(("kind", "eager"), [("silu", F.silu), ("gelu", F.gelu)])
def test_float32_error_is_no_larger_than_eager_torch(kind, eager):
    x = seeded(100_000, dtype=torch.float32, scale=3.0)

    def worst(f) -> list[float]:
        y, (slope,) = run(f, [x])
        z, (expected,) = run(lambda x: f(x) if x.dtype == torch.float32 else ORACLES[kind](x), [x.double()])
        weight = seeded(*x.shape, dtype=torch.float64, seed=7)
        scaled = slope.double() * (weight / seeded(*x.shape, dtype=torch.float32, seed=7).double())
        return [float((y[0] - z[0]).square().mean()), float((scaled - expected).square().mean())]

    ours, theirs = worst(lambda x: activation(x, kind)), worst(eager)
    assert ours[0] <= 1.05 * theirs[0]
    assert ours[1] <= 1.05 * theirs[1]


def test_bad_input_is_named(impl):
    x = torch.ones(2, 4)
    with pytest.raises(ToolkitError, match=r"kind must be one of .*, got 'sillu'; did you mean 'silu'"):
        activation(x, "sillu", impl=impl.option)
    with pytest.raises(ToolkitError, match="kind must be one of clamped_swiglu, gelu, gelu_tanh, relu, relu2"):
        gated_activation(x, x, "tan", impl=impl.option)
    with pytest.raises(ToolkitError, match="kind must be one of gelu, gelu_tanh, relu, relu2"):
        activation(x, "clamped_swiglu", impl=impl.option)
    if impl is TRITON:
        with pytest.raises(ToolkitError, match=r"kernels of activation, got torch\.float64"):
            activation(x.double(), "silu")
    with pytest.raises(ToolkitError, match="must have equal shapes"):
        gated_activation(x, x[:, :1], "silu", impl=impl.option)


def test_opcheck():
    x, up = seeded(3, 8, dtype=torch.float32), seeded(3, 8, dtype=torch.float32, seed=1)
    ops = torch.ops.toolkit
    torch.library.opcheck(ops.activation_backward.default, (x, up, "gelu"))
    torch.library.opcheck(ops.gated_activation_backward.default, (x, up, x, "silu"))
    torch.library.opcheck(ops.gated_activation_backward.default, (x, up, x, "clamped_swiglu"))
    leaves = [t.clone().requires_grad_() for t in (x, up)]
    torch.library.opcheck(ops.activation.default, (leaves[0], "gelu_tanh"))
    torch.library.opcheck(ops.gated_activation.default, (*leaves, "silu"))


def test_torch_compile_takes_the_op_whole():
    gate, up = (seeded(3, 8, dtype=torch.float32, seed=seed) for seed in (0, 1))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(gate: Tensor, up: Tensor) -> Tensor:
        return gated_activation(gate, up, "silu").sum()

    assert torch.equal(f(gate, up), gated_activation(gate, up, "silu").sum())


def test_a_new_kind_is_one_file(tmp_path, monkeypatch):
    """Its torch functions serve the reference and its C++ reaches the build; for Triton see below."""
    (tmp_path / "leaky.py").write_text(LEAKY)
    (tmp_path / "bilinear.py").write_text(BILINEAR)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    kinds.discover()
    try:
        x, up = (seeded(5, 40, dtype=torch.float32, seed=seed) for seed in range(2))
        assert torch.equal(activation(x, "leaky", impl="reference"), F.leaky_relu(x, 0.25))
        assert torch.equal(gated_activation(x, up, "leaky", impl="reference"), F.leaky_relu(x, 0.25) * up)
        assert torch.equal(gated_activation(x, up, "bilinear", impl="reference"), x * up)
        assert torch.equal(kinds.find("bilinear").derivative(x, up)[1], x)
        with pytest.raises(ToolkitError, match=r"kind must be one of .*, got 'bilinear'"):
            activation(x, "bilinear", impl="reference")
    finally:
        monkeypatch.undo()
        kinds.discover()
    assert "leaky" not in KINDS
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    make = runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))["activation_header"]
    with pytest.raises(RuntimeError, match=r"bilinear\.py has no C\+\+ functor beside it"):
        make(tmp_path)
    for name in ("bilinear", "leaky"):
        (tmp_path / f"{name}.h").touch()
    header = make(tmp_path)
    assert f'#include "{tmp_path / "leaky.h"}"' in header
    assert "static_assert(Kind_leaky::kArguments == 1," in header
    assert "static_assert(Kind_bilinear::kArguments == 2," in header
    chooser, plain = header.split("inline void with_plain_kind")
    assert 'if (kind == "bilinear") return body(Kind_bilinear{});' in chooser
    assert "bilinear" not in plain
    (tmp_path / "broken.py").write_text("def values(x):\n    return x\n")
    with pytest.raises(RuntimeError, match=r"broken\.py must have a function value"):
        make(tmp_path)


LEAKY = """
import torch


def value(x):
    return torch.where(x < 0, x / 4, x)


def derivative(x):
    return torch.where(x < 0, 0.25, 1.0)

"""
BILINEAR = """
def value(gate, up):
    return gate * up


def derivative(gate, up):
    return up, gate

"""


@only_triton
def test_a_new_kind_s_triton_functions(impl, tmp_path, monkeypatch):
    """mish: x tanh(log(1 + e^x)), and a gate of two arguments."""
    (tmp_path / "mish.py").write_text(textwrap.dedent(MISH))
    (tmp_path / "two_gates.py").write_text(textwrap.dedent(TRITON_BILINEAR))
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    kinds.discover()
    try:
        x, up, grad = (seeded(5, 40, dtype=torch.float32, scale=2.0, seed=seed) for seed in range(3))
        mish = torch.nn.functional.mish
        assert error(activation(x, "mish"), mish(x.double())) <= 1e-6
        check_oracle(lambda x: activation(x, "mish"), mish, [x], 1e-6)
        assert error(gated_activation(x, up, "mish"), mish(x.double()) * up.double()) <= 1e-6
        assert error(activation(x, "mish", impl="reference"), mish(x.double())) <= 1e-6
        assert torch.equal(gated_activation(x, up, "two_gates"), x * up)
        assert all(
            map(
                torch.equal,
                torch.ops.toolkit.gated_activation_backward(grad, x, up, "two_gates"),
                (grad * up, grad * x),
            )
        )
        with pytest.raises(ToolkitError, match=r"kind must be one of .*, got 'two_gates'"):
            activation(x, "two_gates")
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

"""
TRITON_BILINEAR = """
    def value(gate, up):
        return gate * up

    def derivative(gate, up):
        return up, gate

    def triton_value(gate, up):
        return gate * up

    def triton_both(gate, up):
        return gate * up, up, gate

"""
