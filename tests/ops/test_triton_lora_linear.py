"""Triton low-rank adapters in Triton's interpreter, against fp64."""

import random

import pytest
import torch
from test_lora_linear import make
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers.interpreter import poisoned, row_by_row
from toolkit.errors import ToolkitError
from toolkit.ops.lora_linear import lora_linear, reference, tiles
from toolkit.ops.lora_linear.triton import lora_add
from toolkit.ops.lora_linear.triton_backward import lora_add_backward


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    """Several splits and blocks of rows at small sizes; what is not written stays NaN."""
    monkeypatch.setattr(tiles, "SPLIT", 64)
    monkeypatch.setattr(tiles, "SUMMED_ROWS", 32)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    with poisoned():
        yield


def inputs(rows, inner, outputs, rank, count, dtype=torch.float32, seed=0):
    x, _, _, a, b, scaling, adapters = make(rows, inner, outputs, rank, count, dtype, seed)
    g = torch.Generator().manual_seed(seed + 1)
    base, grad = (torch.randn(rows, outputs, generator=g).to(dtype) for _ in range(2))
    return base, grad, x, a, b, scaling, adapters


def assert_near(value, exact, dtype):
    limit = {torch.float32: 2e-6, torch.float16: 1.1e-3}[dtype]
    assert value.dtype == dtype
    size = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=limit * size)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (0, 5, 4, 3, 2)),
        (torch.float32, (1, 1, 1, 1, 1)),
        (torch.float16, (7, 40, 17, 8, 3)),
        (torch.float32, (37, 70, 20, 5, 2)),
        (torch.float32, (50, 16, 40, 20, 1)),
    ],
)
def test_outputs_and_gradients_match_fp64(dtype, shape):
    base, grad, x, a, b, scaling, adapters = inputs(*shape, dtype)
    wide = [t.double() for t in (base, x, a, b)]
    exact = reference.lora_add(*wide, scaling, adapters)
    y = lora_add(base, x, a, b, scaling, adapters)
    assert_near(y, exact, dtype)
    assert torch.equal(y[adapters < 0], base[adapters < 0])
    wanted = reference.lora_add_backward(grad.double(), *wide[1:], scaling, adapters, True, True, True)
    got = lora_add_backward(grad, x, a, b, scaling, adapters, True, True, True)
    again = lora_add_backward(grad, x, a, b, scaling, adapters, True, True, True)
    for value, repeat, expected in zip(got, again, wanted):
        assert_near(value, expected, dtype)
        assert torch.equal(value, repeat)


def test_a_row_keeps_its_bits_whatever_its_neighbours_use():
    rng = random.Random(0)
    base, grad, x, a, b, scaling, adapters = inputs(40, 70, 33, 8, 3)
    whole = lora_add(base, x, a, b, scaling, adapters)
    (dx, _, _) = lora_add_backward(grad, x, a, b, scaling, adapters, True, False, False)
    for _ in range(2):
        rows = torch.randperm(40)[: rng.choice([1, 17, 25])]
        assert torch.equal(lora_add(base[rows], x[rows], a, b, scaling, adapters[rows]), whole[rows])
        part, _, _ = lora_add_backward(grad[rows], x[rows], a, b, scaling, adapters[rows], True, False, False)
        assert torch.equal(part, dx[rows])
        keep = torch.rand(40) < 0.3
        others = torch.where(keep, adapters, torch.randint(-1, 3, (40,)))
        assert torch.equal(lora_add(base, x, a, b, scaling, others)[keep], whole[keep])


def test_signed_zero_nan_and_adapters_that_do_not_exist():
    base, _, x, a, b, scaling, adapters = inputs(20, 40, 17, 8, 3)
    clean = lora_add(base, x, a, b, scaling, adapters)
    base[adapters < 0] = -0.0
    a[1] = float("nan")
    strange = adapters.clone()
    strange[0] = 7
    y = lora_add(base, x, a, b, scaling, strange)
    assert torch.equal(y[adapters < 0].view(torch.int32), base[adapters < 0].view(torch.int32))
    fine = (strange != 1) & (strange >= 0) & (strange < 3)
    assert torch.equal(y[fine], clean[fine])
    assert bool(y[(strange == 1) | (strange == 7)].isnan().all())


def test_only_what_is_needed_and_unused_adapters():
    _, grad, x, a, b, scaling, _ = inputs(9, 20, 7, 4, 3)
    adapters = torch.tensor([2, -1, 2, 2, -1, 2, 2, 2, 2])
    dx, da, db = lora_add_backward(grad, x, a, b, scaling, adapters, True, True, True)
    assert bool((dx[adapters < 0] == 0).all())
    assert bool((da[:2] == 0).all())
    assert bool((db[:2] == 0).all())
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        for value, needed, full in zip(
            lora_add_backward(grad, x, a, b, scaling, adapters, *needs), needs, (dx, da, db)
        ):
            assert torch.equal(value, full) if needed else value.numel() == 0


def test_strides_and_far_rows():
    base, grad, x, a, b, scaling, adapters = inputs(3, 20, 7, 4, 2, torch.float16)
    adapters = torch.tensor([1, -1, 0])
    y = lora_add(base, x, a, b, scaling, adapters)
    gradients = lora_add_backward(grad, x, a, b, scaling, adapters, True, True, True)
    memory = torch.empty(2 * (1 << 30) + 64, dtype=torch.float16)  # reserved, touched in three rows only
    far = memory.as_strided(x.shape, (1 << 30, 1)).copy_(x)
    turned_a, turned_b = a.transpose(1, 2).contiguous().transpose(1, 2), b.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(lora_add(base.t().contiguous().t(), far, turned_a, turned_b, scaling, adapters), y)
    again = lora_add_backward(grad.t().contiguous().t(), far, turned_a, turned_b, scaling, adapters, True, True, True)
    assert all(torch.equal(*pair) for pair in zip(gradients, again))
    whole = torch.cat([base, base], 1)[:, 7:]
    assert torch.equal(lora_add(whole, x, a, b, scaling, adapters), y)


def test_the_public_function_and_bad_input():
    x, weight, bias, a, b, scaling, adapters = make(12, 30, 17, 4, 2)
    y = lora_linear(x.view(3, 4, 30), weight, bias, a, b, scaling, adapters.view(3, 4), impl="triton")
    wide = [t.double() for t in (x, a, b)]
    exact = reference.lora_add(x.double() @ weight.double().T + bias.double(), *wide, scaling, adapters)
    assert_near(y.view(12, 17), exact, torch.float32)
    with pytest.raises(ToolkitError, match="float64"):
        lora_add(exact, *wide, scaling, adapters)
    none = torch.full((12,), -1)
    base = torch.randn(12, 17)
    assert torch.equal(lora_add(base, x, a[:0], b[:0], scaling[:0], none), base)
    assert torch.equal(lora_add(base, x, a[:, :0], b[:, :, :0], scaling, adapters), base)
