"""Triton linear_cross_entropy in Triton's interpreter, against dense fp64."""

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers.interpreter import close, noise, poisoned, row_by_row
from toolkit.ops.linear_cross_entropy.triton import linear_cross_entropy
from toolkit.ops.linear_logprob import tiles


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    """Several splits and chunks at small sizes; what is not written stays NaN."""
    monkeypatch.setattr(tiles, "SPLIT", 32)
    monkeypatch.setattr(tiles, "CHUNK", 48)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    with poisoned():
        yield


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [0, 21])
def test_value_and_gradients_match_fp64(weighted, dtype, rows):
    tensors = [noise(rows, 40, dtype=dtype), noise(70, 40, dtype=dtype, scale=0.2, seed=1), noise(70, dtype=dtype)]
    targets = torch.arange(rows) * 5 % 90 - 20
    weights = torch.arange(rows) % 4 / 3.0 if weighted else None
    leaves = [x.double().requires_grad_() for x in tensors]
    ignored = torch.where(targets < 0, -100, targets)
    losses = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves), ignored, reduction="none")
    loss = (losses if weights is None else losses * weights.double()).sum()
    wanted = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    got = linear_cross_entropy(*tensors, targets, weights, True, True, True)
    for value, exact in zip(got, wanted):
        assert value.dtype == torch.float32
        close(value, exact, 3e-6 if dtype == torch.float32 else 3e-3)
    few = linear_cross_entropy(*tensors, targets, weights, False, True, False)
    assert [x.numel() for x in few[1:]] == [0, 70 * 40, 0]
    assert torch.equal(few[2], got[2])
