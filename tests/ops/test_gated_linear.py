"""The first half of a gated MLP as one op: bit for bit the ops one after the other."""

import pytest
import torch

from tests.helpers.implementations import TRITON, impl_and_dtype
from toolkit.errors import ToolkitError
from toolkit.ops.activation.kinds import find
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.gated_linear import gated_linear
from toolkit.ops.linear import linear
from toolkit.ops.registry import has_native

IMPLS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not has_native("gated_linear"), reason="no library")),
]
KINDS = ["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]


def numbers(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(rows, outputs, depth, dtype, biased, seed=0):
    x = numbers(*rows, depth, seed=seed, dtype=dtype)
    weights = [numbers(outputs, depth, seed=seed + 1 + at, dtype=dtype) / 4 for at in range(2)]
    biases = [numbers(outputs, seed=seed + 3 + at, dtype=dtype) if biased else None for at in range(2)]
    return (x, *weights, *biases)


def one_after_the_other(x, gate, up, gate_bias, up_bias, kind):
    return gated_activation(linear(x, gate, gate_bias), linear(x, up, up_bias), kind)


@impl_and_dtype()
def test_bits_are_those_of_the_ops_one_after_the_other(impl, dtype):
    sizes = [
        ((1,), 48, 32),
        ((3, 5), 65, 300),
        ((1, 7), 3, 1),
        ((40,), 130, 70),
        ((0,), 5, 8),
        ((2,), 0, 8),
        ((3,), 4, 0),
    ]
    for at, (rows, outputs, depth) in enumerate(sizes[:1] + sizes[4:5] if impl is TRITON else sizes):
        for biased in (False, True):
            arguments = problem(rows, outputs, depth, dtype, biased, seed=10 * at)
            found = gated_linear(*arguments, KINDS[at % len(KINDS)], impl=impl.option)
            assert found.shape == (*rows, outputs)
            assert torch.equal(found, one_after_the_other(*arguments, KINDS[at % len(KINDS)]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_agrees_with_float64(impl, kind):
    arguments = problem((6,), 40, 24, torch.float64, True)
    x, gate, up, gate_bias, up_bias = arguments
    g, u = x @ gate.mT + gate_bias, x @ up.mT + up_bias
    function = find(kind)
    expected = function.value(g, u) if function.arguments == 2 else function.value(g) * u
    if torch.float64 in impl.dtypes:
        found = gated_linear(*arguments, kind, impl=impl.option)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    narrow = gated_linear(*(one.float() for one in arguments), kind, impl=impl.option)
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_row_depends_on_itself_alone_for_any_number_of_threads(impl):
    rows = 9 if impl is TRITON else 300
    x, gate, up, *biases = problem((rows,), 200, 96, torch.float32, True)
    whole = gated_linear(x, gate, up, *biases, "silu", impl=impl.option)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for first, last in ((0, 1), (5, rows // 2 + 3), (0, rows)):
                assert torch.equal(
                    gated_linear(x[first:last], gate, up, *biases, "silu", impl=impl.option), whole[first:last]
                )
    finally:
        torch.set_num_threads(before)
    x[7] = float("nan")
    dirty = gated_linear(x, gate, up, *biases, "silu", impl=impl.option)
    assert dirty[7].isnan().all()
    assert torch.equal(dirty[8:], whole[8:])


def test_strided_inputs(impl):
    x, gate, up, *biases = problem((9,), 20, 16, torch.float32, True)
    spaced = torch.full((9, 40), float("nan"))
    spaced[:, ::2][:, :16] = x
    expected = one_after_the_other(x, gate, up, *biases, "silu")
    assert torch.equal(gated_linear(spaced[:, ::2][:, :16], gate, up, *biases, "silu", impl=impl.option), expected)
    turned = [weight.mT.contiguous().mT for weight in (gate, up)]
    assert torch.equal(gated_linear(x, *turned, *biases, "silu", impl=impl.option), expected)


def test_what_does_not_fit_is_an_error():
    x, gate, up, *biases = problem((3,), 20, 16, torch.float32, True)
    with pytest.raises(ToolkitError, match="one of"):
        gated_linear(x, gate, up, *biases, "sile")
    if has_native("gated_linear"):
        for wrong in ((x[:, :3], gate, up), (x, gate[:3], up), (x, gate, up.double())):
            with pytest.raises(RuntimeError, match="gated_linear: "):
                gated_linear(*wrong, *biases, "silu")


def test_operator_registration():
    arguments = problem((3,), 20, 16, torch.float32, True)
    torch.library.opcheck(torch.ops.toolkit.gated_linear.default, (*arguments, "silu"))
