"""Triton experts in Triton's interpreter, against a dense oracle in fp64."""

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers.interpreter import close, poisoned, row_by_row
from tests.helpers.moe_dense import LAYOUTS, dense_experts, exact_gradients, layer, normal, routing
from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan.triton import dispatch_plan
from toolkit.ops.experts.triton import experts, input_rows
from toolkit.ops.experts.triton_backward import experts_backward
from toolkit.ops.grouped_linear.triton import grouped_linear

EXPERTS = 3
# Sums of some tens of terms one after the other; 16 bits: z, a, y and their gradients are rounded on the way.
NEAR = {torch.float32: 4e-6, torch.float16: 2**-9}
ALL = [True] * 6
CASES = [(layout, torch.float32) for layout in LAYOUTS] + [(layout, torch.float16) for layout in LAYOUTS[:6:2]]


@pytest.fixture(autouse=True)
def poisoned_and_row_by_row(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    with poisoned():
        yield


def made(layout, tokens=9, slots=2, hidden=33, inner=17, dtype=torch.float32, scored=torch.float32):
    """(x, scores, up, up_bias, down, down_bias), ids, flags, grad."""
    kind, gated, biased, site, transposed, interleaved = layout
    x, scores = normal(tokens, hidden, dtype=dtype), normal(tokens, slots, seed=9).abs().to(scored)
    inputs = [x, scores, *layer(EXPERTS, hidden, inner, gated, biased, transposed, dtype)]
    grad = normal(tokens, hidden, dtype=dtype, seed=10)
    return inputs, routing(tokens, slots, EXPERTS), (kind, site, transposed, interleaved), grad


def backward(grad, inputs, z, plan, flags, needs=ALL):
    x, scores, up, _, down, down_bias = inputs
    biased = down_bias is not None
    needs = [need and (biased or index not in (3, 5)) for index, need in enumerate(needs)]
    return experts_backward(grad, x, scores, z, up, down, down_bias, *plan, *flags, *needs)


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_outputs_and_gradients_match_fp64(layout, dtype):
    inputs, ids, flags, grad = made(layout, dtype=dtype, scored=dtype)
    plan = dispatch_plan(ids, EXPERTS, 16)
    out, z = experts(*inputs, *plan, *flags)
    assert out.dtype == z.dtype == dtype
    wide = [None if t is None else t.double() for t in inputs]
    close(out, dense_experts(*wide, ids, *flags), NEAR[dtype])
    assert int(torch.count_nonzero(z[int(plan[2][-1]) :])) == 0
    got = backward(grad, inputs, z, plan, flags)
    for value, exact, like in zip(got, exact_gradients(inputs, grad, ids, *flags), inputs, strict=True):
        if exact is None:
            assert value.numel() == 0
            continue
        assert value.dtype == like.dtype
        close(value, exact, NEAR[dtype])
    assert all(int(torch.count_nonzero(one[1])) == 0 for one in got[2:] if one.numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pre_activation_is_the_grouped_product_to_the_bit(layout):
    """What a backward that takes the first product again relies on."""
    inputs, ids, flags, _ = made(layout, hidden=40)
    x, scores, up, up_bias, _, _ = inputs
    plan, site = dispatch_plan(ids, EXPERTS, 16), flags[1]
    source = input_rows(x, scores, *plan[:3], site)
    again = grouped_linear(source, up, up_bias, *plan, site != "input", flags[2])
    assert torch.equal(experts(*inputs, *plan, *flags)[1], again)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[5]])
def test_a_token_keeps_its_bits_in_any_company(layout):
    tokens = 9
    inputs, ids, flags, grad = made(layout, tokens, hidden=20)

    def both(some, tile=16):
        part = [inputs[0][some], inputs[1][some], *inputs[2:]]
        plan = dispatch_plan(ids[some], EXPERTS, tile)
        out, z = experts(*part, *plan, *flags)
        needs = [True, True, False, False, False, False]
        return out, *backward(grad[some], part, z, plan, flags, needs)[:2]

    whole = both(torch.arange(tokens))
    for tile in (16, 5):  # again, and by another plan
        for one, other in zip(both(torch.arange(tokens), tile), whole, strict=True):
            assert torch.equal(one, other)
    generator = torch.Generator().manual_seed(2)
    for size in (1, 5):
        some = torch.randperm(tokens, generator=generator)[:size]
        for one, other in zip(both(some), whole, strict=True):
            assert torch.equal(one, other[some])
    inputs[0][4] = torch.nan
    others = torch.arange(tokens) != 4
    for one, other in zip(both(torch.arange(tokens)), whole, strict=True):
        assert torch.equal(one[others], other[others])


def test_scores_of_another_dtype_and_only_what_is_needed():
    inputs, ids, flags, grad = made(LAYOUTS[1], dtype=torch.float16)
    plan = dispatch_plan(ids, EXPERTS, 64)
    out, z = experts(*inputs, *plan, *flags)
    wide = [t.double() for t in inputs]
    close(out, dense_experts(*wide, ids, *flags), NEAR[torch.float16])
    whole = backward(grad, inputs, z, plan, flags)
    assert whole[1].dtype == torch.float32
    close(whole[1], exact_gradients(inputs, grad, ids, *flags)[1], NEAR[torch.float16])
    for wanted in ({0, 3, 5}, {1}, {2, 4}):
        needs = [index in wanted for index in range(6)]
        for index, value in enumerate(backward(grad, inputs, z, plan, flags, needs)):
            assert torch.equal(value, whole[index]) if index in wanted else value.numel() == 0


@pytest.mark.parametrize("site", ["activation", "input"])
def test_no_tokens_no_experts_and_all_skipped(site):
    for tokens, skipped in ((0, False), (5, True)):
        inputs, ids, flags, grad = made(("silu", True, True, site, False, False), tokens)
        ids = torch.full_like(ids, EXPERTS) if skipped else ids
        plan = dispatch_plan(ids, EXPERTS, 16)
        out, z = experts(*inputs, *plan, *flags)
        assert torch.equal(out, torch.zeros(tokens, 33))
        assert torch.equal(z, torch.zeros(2 * tokens, 34))
        for value, like in zip(backward(grad, inputs, z, plan, flags), inputs, strict=True):
            assert torch.equal(value, torch.zeros_like(like))


def test_bad_input_is_one_sentence():
    inputs, ids, flags, _ = made(LAYOUTS[0])
    plan = dispatch_plan(ids, EXPERTS, 16)
    with pytest.raises(ToolkitError, match=r"experts got dtype torch\.float64"):
        experts(*(None if t is None else t.double() for t in inputs), *plan, *flags)
