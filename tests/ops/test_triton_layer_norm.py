"""Triton layer_norm in Triton's interpreter, against fp64."""

import pytest
import torch

from tests.helpers.interpreter import DTYPES, TOLERANCE, close, far_apart, gradients, noise, poisoned, rows_alone
from toolkit.errors import ToolkitError
from toolkit.ops.layer_norm import layer_norm
from toolkit.ops.layer_norm.triton import layer_norm_backward
from toolkit.ops.triton_rows import MAX_WIDTH, parts, whole_row

EPS = 1e-5
SHAPES = [(2, 3, 60), (67, 7), (0, 8), (3, 0), (9,), (2, 2050), (3, 9000)]


def exact(x, weight=None, bias=None):
    centered = x - x.mean(-1, keepdim=True)
    y = centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + EPS)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", ["", "w", "b", "wb"])
def test_matches_fp64(dtype, parameters):
    for shape in SHAPES:
        x, grad = noise(*shape, dtype=dtype) + 0.5, noise(*shape, dtype=dtype, seed=1)
        found = {name: noise(shape[-1], dtype=dtype, seed=2 + i) for i, name in enumerate(parameters)}
        weight, bias = found.get("w"), found.get("b")
        with poisoned():
            y = layer_norm(x, weight, bias, EPS, impl="triton")
            results = layer_norm_backward(grad, x, weight, bias, EPS)
        assert y.dtype == dtype
        close(y, exact(x.double(), *(None if p is None else p.double() for p in (weight, bias))), TOLERANCE[dtype])

        def oracle(x, *given, parameters=parameters):
            named = dict(zip(parameters, given))
            return exact(x, named.get("w"), named.get("b"))

        wanted = dict(zip(["x", *parameters], gradients(oracle, [x, *found.values()], [grad])))
        for name, got in zip("xwb", results):
            assert got.dtype == dtype
            if name in wanted:
                close(got, wanted[name], 2 * TOLERANCE[dtype])
            else:
                assert got.numel() == 0


def test_rows_of_one_element():
    x, weight, bias = noise(5, 1), noise(1, seed=1), noise(1, seed=2)
    assert torch.equal(layer_norm(x, weight, bias, EPS, impl="triton"), bias.expand(5, 1))
    dx, dweight, dbias = layer_norm_backward(x, x, weight, bias, EPS)
    assert not dx.any()
    assert not dweight.any()
    close(dbias, x.double().sum(0), 1e-6)


def test_strides():
    x, weight = noise(3, 5, 40, dtype=torch.float16), noise(32, dtype=torch.float16, seed=1)[::2]
    for view in (x[..., :16], x[:, 1:4, 8:24], x.transpose(0, 1)[..., 1:17], x[..., 1:33:2]):
        same = view.contiguous()
        assert torch.equal(
            layer_norm(view, weight, None, EPS, impl="triton"), layer_norm(same, weight, None, EPS, impl="triton")
        )
        grad = noise(1, 1, 1).expand(same.shape)
        got = layer_norm_backward(grad, view, weight, weight, EPS)
        assert all(map(torch.equal, got, layer_norm_backward(grad.contiguous(), same, weight, weight, EPS)))


@pytest.mark.parametrize("width", [1, 60, 700, 4500])
def test_rows_do_not_depend_on_other_rows(width):
    x, grad, weight = noise(19, width), noise(19, width, seed=1), noise(width, seed=2)
    rows_alone(lambda x: layer_norm(x, weight, weight, EPS, impl="triton"), [x])
    rows_alone(lambda g, x: layer_norm_backward(g, x, weight, None, EPS)[0], [grad, x])


@pytest.mark.parametrize(("rows", "width"), [(70, 600), (40, 4300)])
def test_many_rows_a_program(rows, width):
    """The sum over rows where a program walks several tiles; the same bits again."""
    assert parts(rows, whole_row(min(width, 4096), 4), noise(1))[1] > 1
    x, grad, weight, bias = (
        noise(*s, seed=i) for i, s in enumerate([(rows, width), (rows, width), (width,), (width,)])
    )
    with poisoned():
        got = layer_norm_backward(grad, x, weight, bias, EPS)
        again = layer_norm_backward(grad, x, weight, bias, EPS)
    assert all(map(torch.equal, got, again))
    for one, wanted in zip(got, gradients(exact, [x, weight, bias], [grad])):
        close(one, wanted, 3e-6)


def test_extreme_values():
    x = torch.tensor([[0.0] * 5, [7.0] * 5, [1e15, -1e15, 0.0, 1.0, 1e15]])
    close(layer_norm(x, None, None, EPS, impl="triton"), exact(x.double()), 3e-7)
    x[1, 2] = torch.nan
    assert layer_norm(x, None, None, EPS, impl="triton").isnan().any(-1).tolist() == [False, True, False]


def test_offsets_past_two_to_the_31():
    x, grad, weight = noise(5, 40, dtype=torch.float16), noise(5, 40, dtype=torch.float16, seed=1), noise(40, seed=2)
    far = far_apart(x)
    assert torch.equal(
        layer_norm(far, weight, None, EPS, impl="triton"), layer_norm(x, weight, None, EPS, impl="triton")
    )
    got, wanted = (layer_norm_backward(grad, t, weight, weight, EPS) for t in (far, x))
    assert all(map(torch.equal, got, wanted))


def test_bad_input_is_one_sentence():
    with pytest.raises(ToolkitError, match=f"at most {MAX_WIDTH}"):
        layer_norm(torch.zeros(1, MAX_WIDTH + 1), None, None, EPS, impl="triton")
    with pytest.raises(ToolkitError, match="float64"):
        layer_norm(torch.zeros(1, 4, dtype=torch.float64), None, None, EPS, impl="triton")
