"""Plain and gated activations."""

import math

import pytest
import torch
import torch.nn.functional as F
from rowwise_checks import DTYPES, IMPLS, check_oracle, check_repeatable, check_rows, error, run, seeded
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.activation import KINDS, activation
from toolkit.ops.gated_activation import gated_activation

ORACLES = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
}
SHAPES = [(1, 1), (3, 7), (5, 60), (3, 513), (2, 3, 64), (0, 16), (4, 0), (9,)]


def test_every_kind_has_an_oracle():
    assert set(KINDS) == set(ORACLES)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(impl, dtype, kind):
    for shape in SHAPES:
        x, up = seeded(*shape, dtype=dtype, scale=2.0), seeded(*shape, dtype=dtype, seed=1)
        check_oracle(lambda x: activation(x, kind, impl=impl), ORACLES[kind], [x])
        gated = [x, up]
        check_oracle(lambda g, u: gated_activation(g, u, kind, impl=impl), lambda g, u: ORACLES[kind](g) * u, gated)


def test_a_scalar_has_an_activation():
    check_oracle(lambda x: activation(x, "silu"), ORACLES["silu"], [torch.tensor(0.7)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_limits_are_exact_in_value_and_gradient(impl, dtype, kind):
    far = [-math.inf, torch.finfo(dtype).min, -1e4, -200.0, 200.0, 1e4, torch.finfo(dtype).max, math.inf]
    x = torch.tensor(far, dtype=dtype, requires_grad=True)
    y = activation(x, kind, impl=impl)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = {"relu2": torch.where(x > 0, x * x, 0)}.get(kind, torch.where(x > 0, x, 0))
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-80)
    assert torch.allclose(slope, 2 * x.clamp_min(0) if kind == "relu2" else (x > 0).to(dtype), rtol=0, atol=1e-80)
    up = torch.full_like(x, 2.0).requires_grad_()
    _, (of_gate, of_up) = run(lambda g, u: gated_activation(g, u, kind, impl=impl), [x, up])
    weight = seeded(*x.shape, dtype=dtype, seed=7)
    assert torch.allclose(of_gate, 2 * weight * slope, rtol=2e-3, atol=1e-80)
    assert torch.allclose(of_up, weight * y.detach(), rtol=2e-3, atol=1e-80)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_with_its_element(impl, kind):
    x = seeded(40, dtype=torch.float32)
    x[17] = torch.nan
    y, (slope,) = run(lambda x: activation(x, kind, impl=impl), [x])
    others = torch.arange(40) != 17
    assert y[0][17].isnan()
    assert y[0][others].isfinite().all()
    assert slope[others].isfinite().all()
    assert slope[17].isnan() or kind == "relu"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_depend_on_other_rows(impl, kind, dtype):
    for rows, width in ((70, 1), (70, 60), (41, 2049)):
        x, up = seeded(rows, width, dtype=dtype, scale=3.0), seeded(rows, width, dtype=dtype, seed=1)
        check_rows(lambda x: activation(x, kind, impl=impl), [x])
        check_rows(lambda g, u: gated_activation(g, u, kind, impl=impl), [x, up])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_element_has_the_same_bits_anywhere(impl, kind):
    x = seeded(60, dtype=torch.float32, scale=3.0)
    places = torch.stack([torch.cat([torch.zeros(n), x, torch.zeros(40 - n)]) for n in range(40)])
    y = activation(places, kind, impl=impl)
    for n in range(40):
        assert torch.equal(y[n, n : n + 60], y[0, :60])


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    both = seeded(3, 5, 40, dtype=torch.float32)
    gate, up = both.chunk(2, dim=-1)
    for g, u in (
        (gate, up),
        (gate[:, ::2], up[:, ::2]),
        (gate[..., ::2], up[..., ::2]),
        (both.mT, both.mT + 1),
    ):
        y, grads = run(lambda g, u: gated_activation(g, u, "silu", impl=impl), [g, u])
        z, expected = run(lambda g, u: gated_activation(g, u, "silu"), [g.contiguous(), u.contiguous()])
        assert y[0].is_contiguous()
        assert max(map(error, [*y, *grads], [*z, *expected])) < 1e-6
        y, grads = run(lambda g: activation(g, "gelu", impl=impl), [g])
        z, expected = run(lambda g: activation(g, "gelu"), [g.contiguous()])
        assert y[0].is_contiguous()
        assert max(map(error, [*y, *grads], [*z, *expected])) < 1e-6


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


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input_is_named(impl):
    x = torch.ones(2, 4)
    with pytest.raises(ToolkitError, match=r"kind is 'sillu'; .*did you mean 'silu'"):
        activation(x, "sillu", impl=impl)
    with pytest.raises(ToolkitError, match="kind is 'tanh'; allowed are silu, gelu, gelu_tanh, relu, relu2"):
        gated_activation(x, x, "tanh", impl=impl)
    with pytest.raises(ToolkitError, match="must be equal"):
        gated_activation(x, x[:, :1], "silu", impl=impl)


def test_opcheck():
    x, up = seeded(3, 8, dtype=torch.float32), seeded(3, 8, dtype=torch.float32, seed=1)
    ops = torch.ops.toolkit
    torch.library.opcheck(ops.activation_backward.default, (x, up, "gelu"))
    torch.library.opcheck(ops.gated_activation_backward.default, (x, up, x, "silu"))
    leaves = [t.clone().requires_grad_() for t in (x, up)]
    torch.library.opcheck(ops.activation.default, (leaves[0], "gelu_tanh"))
    torch.library.opcheck(ops.gated_activation.default, (*leaves, "silu"))


def test_torch_compile_takes_the_op_whole():
    gate, up = (seeded(3, 8, dtype=torch.float32, seed=seed) for seed in (0, 1))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(gate: Tensor, up: Tensor) -> Tensor:
        return gated_activation(gate, up, "silu").sum()

    assert torch.equal(f(gate, up), gated_activation(gate, up, "silu").sum())
