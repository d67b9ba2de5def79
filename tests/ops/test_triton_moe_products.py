"""Triton grouped_linear and combine in Triton's interpreter, against fp64."""

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers.interpreter import DTYPES, TOLERANCE, close, poisoned, row_by_row
from tests.helpers.moe_dense import normal, routing
from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan.triton import dispatch_plan
from toolkit.ops.grouped_linear import reference
from toolkit.ops.grouped_linear.triton import grouped_linear
from toolkit.ops.grouped_linear.triton_backward import grouped_linear_backward
from toolkit.ops.grouped_linear.triton_combine import combine, combine_backward

# Sums of some tens of terms, and of a gradient's rows, rounded to 16 bits before they are added.
NEAR = {torch.float32: 4 * TOLERANCE[torch.float32], torch.float16: 2 * TOLERANCE[torch.float16]}
EXPERTS = 3


@pytest.fixture(autouse=True)
def poisoned_and_row_by_row(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    with poisoned():
        yield


def product(tokens, slots, inner, outputs, gather, transposed, dtype=torch.float32, tile=16):
    """x, weight, bias, grad and plan."""
    plan = dispatch_plan(routing(tokens, slots, EXPERTS), EXPERTS, tile)
    x = normal(tokens if gather else tokens * slots, inner, dtype=dtype)
    weight = normal(EXPERTS, outputs, inner, dtype=dtype, scale=inner**-0.5, seed=1)
    weight = weight.mT.contiguous() if transposed else weight
    bias, grad = normal(EXPERTS, outputs, dtype=dtype, seed=2), normal(tokens * slots, outputs, dtype=dtype, seed=3)
    return x, weight, bias, grad, plan


def oracle(x, weight, bias, plan, gather, transposed):
    """A row at a time."""
    order, rows, offsets, _ = plan
    out = [x.new_zeros(weight.shape[2 if transposed else 1])] * len(order)
    for expert in range(EXPERTS):
        matrix = weight[expert].mT if transposed else weight[expert]
        for row in range(int(offsets[expert]), int(offsets[expert + 1])):
            out[row] = matrix @ x[int(order[row]) // rows.shape[1] if gather else row] + bias[expert]
    return torch.stack(out) if out else x.new_zeros(0, weight.shape[2 if transposed else 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gather", "transposed"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("tokens", "slots", "inner", "outputs"), [(11, 2, 33, 40), (3, 1, 32, 17), (1, 3, 1, 1)])
def test_outputs_and_gradients_match_fp64(dtype, gather, transposed, tokens, slots, inner, outputs):
    x, weight, bias, grad, plan = product(tokens, slots, inner, outputs, gather, transposed, dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = oracle(*leaves, plan, gather, transposed)
    y = grouped_linear(x, weight, bias, *plan, gather, transposed)
    close(y, exact.detach(), NEAR[dtype])
    assert int(torch.count_nonzero(y[int(plan[2][-1]) :])) == 0
    if exact.requires_grad:
        wanted = torch.autograd.grad(exact, leaves, grad.double())
        got = grouped_linear_backward(grad, x, weight, *plan, gather, transposed, True, True, True)
        for value, one, like in zip(got, wanted, (x, weight, bias), strict=True):
            assert value.dtype == like.dtype
            close(value, one, NEAR[dtype])
        assert int(torch.count_nonzero(got[1][1])) == int(torch.count_nonzero(got[2][1])) == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_bits_of_a_row_are_its_own_whatever_the_company_and_the_plan_s_tile(transposed):
    tokens, slots = 20, 2
    x, weight, bias, _, _ = product(tokens, slots, 40, 20, True, transposed)
    ids = routing(tokens, slots, EXPERTS)

    def by_slot(some, tile=16):
        plan = dispatch_plan(ids[some], EXPERTS, tile)
        y = grouped_linear(x[some], weight, bias, *plan, True, transposed)
        found = y[plan[1].clamp_min(0)]
        return torch.where(plan[1][..., None] >= 0, found, 0.0)

    whole = by_slot(torch.arange(tokens))
    for tile in (5, 40):
        assert torch.equal(by_slot(torch.arange(tokens), tile), whole)
    generator = torch.Generator().manual_seed(1)
    for size in (1, 9):
        some = torch.randperm(tokens, generator=generator)[:size]
        assert torch.equal(by_slot(some), whole[some])
    x[5] = torch.nan
    others = torch.arange(tokens) != 5
    assert torch.equal(by_slot(torch.arange(tokens))[others], whole[others])


def test_layouts_of_memory_and_only_what_is_needed():
    x, weight, bias, grad, plan = product(7, 2, 20, 16, True, False)
    y = grouped_linear(x, weight, bias, *plan, True, False)
    whole = grouped_linear_backward(grad, x, weight, *plan, True, False, True, True, True)
    turned = weight.mT.contiguous().mT
    assert torch.equal(
        grouped_linear(x, weight[:, :, None].expand(-1, -1, 2, -1)[:, :, 1], bias, *plan, True, False), y
    )
    close(grouped_linear(x.T.contiguous().T, turned, bias, *plan, True, False), y, 1e-6)
    strided = torch.stack([weight, weight], -1)[..., 0]
    assert torch.equal(grouped_linear(x, strided, bias, *plan, True, False), y)
    for at in range(3):
        needs = [index == at for index in range(3)]
        for index, value in enumerate(grouped_linear_backward(grad, x, weight, *plan, True, False, *needs)):
            assert torch.equal(value, whole[index]) if index == at else value.numel() == 0


def test_nothing_to_do_and_bad_input():
    for tokens, experts in ((0, 3), (4, 0)):
        plan = dispatch_plan(torch.zeros(tokens, 2, dtype=torch.int64), experts, 16)
        x, weight = normal(tokens, 8), normal(experts, 5, 8)
        y = grouped_linear(x, weight, None, *plan, True, False)
        assert torch.equal(y, torch.zeros(2 * tokens, 5))
        got = grouped_linear_backward(y, x, weight, *plan, True, False, True, True, True)
        assert [int(torch.count_nonzero(t)) for t in got] == [0, 0, 0]
        assert [t.shape for t in got] == [x.shape, weight.shape, (experts, 5)]
    x, weight, _, _, plan = product(4, 2, 8, 5, True, False)
    with pytest.raises(ToolkitError, match=r"grouped_linear got dtype torch\.float64"):
        grouped_linear(x.double(), weight.double(), None, *plan, True, False)
    with pytest.raises(ToolkitError, match="bfloat16 on CPU"):
        grouped_linear(x.bfloat16(), weight.bfloat16(), None, *plan, True, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "slots", "width"), [(7, 3, 33), (1, 1, 1), (0, 2, 4), (2, 2, 2100)])
@pytest.mark.parametrize("scored", [None, torch.float32, torch.float16])
def test_combine_has_the_specification_s_bits_and_fp64_s_gradients(dtype, tokens, slots, width, scored):
    rows = dispatch_plan(routing(tokens, slots, EXPERTS), EXPERTS, 16)[1]
    y, grad = normal(tokens * slots, width, dtype=dtype), normal(tokens, width, dtype=dtype, seed=1)
    weights = None if scored is None else normal(tokens, slots, dtype=scored, seed=2)
    out = combine(y, rows, weights)
    assert torch.equal(out, reference.combine(y, rows, weights))
    strange = y.clone()
    unused = torch.ones(len(y), dtype=torch.bool)
    unused[rows[rows >= 0]] = False
    strange[unused] = torch.nan
    skipped = None if weights is None else torch.where(rows >= 0, weights, torch.nan)
    assert torch.equal(combine(strange, rows, skipped), out)
    leaf, factor = y.double().requires_grad_(), torch.ones(rows.shape) if weights is None else weights
    factor = factor.double().requires_grad_()
    picked = torch.where(rows[..., None] >= 0, leaf[rows.clamp_min(0)] if len(y) else leaf.view(0, slots, width), 0.0)
    exact = torch.autograd.grad((picked * factor[..., None]).sum(1), [leaf, factor], grad.double())
    to_y, to_weights = combine_backward(grad, y, rows, weights, True, weights is not None)
    close(to_y, exact[0], TOLERANCE[dtype])
    if weights is None:
        assert to_weights.numel() == 0
    else:
        assert to_weights.dtype == scored
        close(to_weights, exact[1], TOLERANCE[scored])
        assert torch.equal(combine_backward(grad, y, rows, weights, False, True)[1], to_weights)
