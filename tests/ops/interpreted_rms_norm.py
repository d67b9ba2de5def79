"""Triton rms_norm in Triton's interpreter, against fp64. Run by test_triton_rms_norm.py in a process of its
own."""

import os

import pytest
import torch

from toolkit.errors import ToolkitError
from toolkit.ops.rms_norm.triton import MAX_WIDTH, rms_norm, rms_norm_backward

assert os.environ.get("TRITON_INTERPRET") == "1"


def exact(x, weight, eps, offset):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (offset + weight)


@pytest.mark.parametrize("shape", [(2, 3, 60), (67, 7), (1, 1), (0, 8)])
@pytest.mark.parametrize(("weighted", "offset"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_matches_fp64(shape, weighted, offset):
    torch.manual_seed(0)
    x, grad = torch.randn(shape), torch.randn(shape)
    weight = torch.randn(shape[-1]) if weighted else None
    leaf = x.double().requires_grad_()
    leaf_weight = weight.double().requires_grad_() if weight is not None else None
    expected = exact(leaf, leaf_weight, 1e-6, offset)
    expected.backward(grad.double())
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, offset).double(), expected.detach(), rtol=2e-6, atol=2e-6)
    dx, dweight = rms_norm_backward(grad, x, weight, 1e-6, offset)
    torch.testing.assert_close(dx.double(), leaf.grad, rtol=2e-5, atol=2e-5)
    if leaf_weight is None:
        assert dweight.numel() == 0
    else:
        torch.testing.assert_close(dweight.double(), leaf_weight.grad, rtol=2e-5, atol=2e-5)


def test_rows_strides_and_half_precision():
    x = torch.randn(9, 48, dtype=torch.float16) * 200
    weight = torch.randn(48, dtype=torch.float16)
    y = rms_norm(x, weight, 1e-5, 0.0)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), exact(x.double(), weight.double(), 1e-5, 0.0), rtol=2e-3, atol=2e-3)
    wide = torch.cat([x, x], -1)
    assert torch.equal(rms_norm(wide[3:, :48], weight, 1e-5, 0.0), y[3:])
    assert torch.equal(rms_norm(x.t().contiguous().t(), weight, 1e-5, 0.0), y)


def test_bad_input_is_one_sentence():
    with pytest.raises(ToolkitError, match=f"at most {MAX_WIDTH}"):
        rms_norm(torch.zeros(1, MAX_WIDTH + 1), None, 1e-6, 0.0)
    with pytest.raises(ToolkitError, match="float64"):
        rms_norm(torch.zeros(1, 4, dtype=torch.float64), None, 1e-6, 0.0)
