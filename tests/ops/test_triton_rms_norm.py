"""Triton rms_norm and add_rms_norm in Triton's interpreter, against fp64."""

import pytest
import torch

from tests.helpers.interpreter import DTYPES, TOLERANCE, close, far_apart, gradients, noise, poisoned, rows_alone
from toolkit.errors import ToolkitError
from toolkit.ops.rms_norm import add_rms_norm, rms_norm
from toolkit.ops.rms_norm.triton import add_rms_norm_backward, rms_norm_backward
from toolkit.ops.triton_rows import MAX_WIDTH, parts, whole_row

EPS = 1e-6
SHAPES = [(2, 3, 60), (67, 7), (1, 1), (5, 1), (0, 8), (3, 0), (9,), (2, 2050), (3, 9000)]


def exact(x, weight=None, offset=0.0):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * (offset + weight)


def exact_sum(x, residual, *rest):
    return exact(x + residual, *rest), x + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weighted", "offset"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_matches_fp64(dtype, weighted, offset):
    for shape in SHAPES:
        x, grad = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1)
        weight = noise(shape[-1], dtype=dtype, seed=2) if weighted else None
        with poisoned():
            y = rms_norm(x, weight, EPS, offset, impl="triton")
            dx, dweight = rms_norm_backward(grad, x, weight, EPS, offset)
        given = [x, weight] if weighted else [x]
        wanted = gradients(lambda *t: exact(*t[:2], *([offset] * weighted)), given, [grad])
        assert y.dtype == dx.dtype == dtype
        close(y, exact(x.double(), None if weight is None else weight.double(), offset), TOLERANCE[dtype])
        if shape[-1] > 1:  # of one element, dx is what cancellation leaves
            close(dx, wanted[0], 2 * TOLERANCE[dtype])
        if weighted:
            assert dweight.dtype == dtype
            close(dweight, wanted[1], 2 * TOLERANCE[dtype])
        else:
            assert dweight.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_residual(dtype, weighted):
    for shape in SHAPES:
        x, residual, grad, grad_sum = (noise(*shape, dtype=dtype, seed=seed) for seed in range(4))
        weight = noise(shape[-1], dtype=dtype, seed=5) if weighted else None
        with poisoned():
            y, total = add_rms_norm(x, residual, weight, EPS, 1.0, impl="triton")
            dx, dweight = add_rms_norm_backward(grad, grad_sum, total, weight, EPS, 1.0)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, rms_norm(x + residual, weight, EPS, 1.0, impl="triton"))
        alone, same = rms_norm_backward(grad, total, weight, EPS, 1.0)
        assert torch.equal(dweight, same)
        if dtype == torch.float32:
            assert torch.equal(dx, alone + grad_sum)
        wide = [total] if weight is None else [total, weight]
        oracle = gradients(lambda *t: (exact(*t, *([1.0] * weighted)), t[0]), wide, [grad, grad_sum])
        if shape[-1] > 1:
            close(dx, oracle[0], 2 * TOLERANCE[dtype])


def test_rows_and_strides():
    x, weight = noise(9, 48, dtype=torch.float16, scale=200.0), noise(96, dtype=torch.float16, seed=1)[::2]
    y = rms_norm(x, weight, EPS, impl="triton")
    wide = torch.cat([x, x], -1)
    assert torch.equal(rms_norm(wide[3:, :48], weight, EPS, impl="triton"), y[3:])
    assert torch.equal(rms_norm(x.t().contiguous().t(), weight, EPS, impl="triton"), y)
    heads = noise(5, 3 * 32).view(5, 3, 32)[:, 1:]
    assert torch.equal(
        rms_norm(heads, None, EPS, impl="triton"), rms_norm(heads.contiguous(), None, EPS, impl="triton")
    )
    grad = noise(1, 1).expand(9, 48)
    got, wanted = (rms_norm_backward(g, x, weight, EPS, 0.0) for g in (grad, grad.contiguous()))
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("width", [1, 60, 700, 4500])
def test_rows_do_not_depend_on_other_rows(width):
    inputs = [noise(19, width, seed=seed) for seed in range(3)]
    weight = noise(width, seed=9)
    rows_alone(lambda x, r: add_rms_norm(x, r, weight, EPS, impl="triton"), inputs[:2])
    rows_alone(lambda *t: add_rms_norm_backward(*t, weight, EPS, 0.0)[0], inputs)


@pytest.mark.parametrize(("rows", "width"), [(70, 600), (40, 4300)])
def test_many_rows_a_program(rows, width):
    """The sum over rows where a program walks several tiles; the same bits again."""
    assert parts(rows, whole_row(min(width, 4096), 4), noise(1))[1] > 1
    x, grad, weight = noise(rows, width), noise(rows, width, seed=1), noise(width, seed=2)
    with poisoned():
        got = rms_norm_backward(grad, x, weight, EPS, 0.0)
        again = rms_norm_backward(grad, x, weight, EPS, 0.0)
    assert all(map(torch.equal, got, again))
    for one, wanted in zip(got, gradients(exact, [x, weight], [grad])):
        close(one, wanted, 3e-6)


def test_extreme_values():
    x = torch.tensor([[0.0] * 5, [1e-20] * 5, [1e15, -1e15, 0.0, 1.0, 1e15], [1.0] * 5])
    close(rms_norm(x, None, EPS, impl="triton"), exact(x.double()), 3e-7)
    x[1, 2] = torch.nan
    assert rms_norm(x, None, EPS, impl="triton").isnan().any(-1).tolist() == [False, True, False, False]


def test_offsets_past_two_to_the_31():
    x, grad, weight = noise(5, 40, dtype=torch.float16), noise(5, 40, dtype=torch.float16, seed=1), noise(40, seed=2)
    far = far_apart(x)
    got, wanted = (add_rms_norm(x, t, weight, EPS, impl="triton") for t in (far, x))
    assert all(map(torch.equal, got, wanted))
    got, wanted = (add_rms_norm_backward(grad, t, t, weight, EPS, 0.0) for t in (far, x))
    assert all(map(torch.equal, got, wanted))


def test_bad_input_is_one_sentence():
    with pytest.raises(ToolkitError, match=f"at most {MAX_WIDTH}"):
        rms_norm(torch.zeros(1, MAX_WIDTH + 1), None, EPS, impl="triton")
    with pytest.raises(ToolkitError, match="float64"):
        rms_norm(torch.zeros(1, 4, dtype=torch.float64), None, EPS, impl="triton")
