"""MoE ops on a GPU: the plan, the router, and experts forward and backward against float64, and bits."""

import math

import pytest
import torch

from tests.helpers.bounds import (
    UNIT,
    assert_near,
    assert_same_bits,
    doubles,
    evaluate,
    integers,
    matrix_noise,
    noise,
    subsets,
)
from tests.helpers.implementations import (
    FLOATS,
    HALF,
    NATIVE,
    SMALL,
    TRITON,
    impl_and_dtype,
    needs_cuda,
)
from tests.helpers.moe_dense import LAYOUTS, dense_experts, layer
from toolkit.ops.dispatch_plan import TILE, dispatch_plan
from toolkit.ops.dispatch_plan import reference as plans
from toolkit.ops.experts import experts
from toolkit.ops.grouped_linear import combine, grouped_linear
from toolkit.ops.route import reference, route

# tokens, slots, experts, H, I: whole steps of aligned rows; nothing aligned.
SIZES = [(9, 2, 3, 32, 16), (7, 2, 3, 33, 17)] if SMALL else [(300, 4, 8, 512, 384), (300, 3, 9, 133, 77)]
PLANS = [(9, 2, 5, 4)] if SMALL else [(1, 8, 128, 64), (517, 8, 128, 64), (20000, 10, 512, 64), (900, 6, 160, 16)]
ROUTERS = [(24, 4, "sigmoid", 6, 2, 2)] if SMALL else [
    (128, 8, "softmax", 1, 1, 1), (256, 8, "sigmoid", 8, 4, 2), (160, 6, "softmax", 8, 3, 1),
]  # fmt: skip


def made(layout, sizes, dtype):
    """(x, scores), weights, ids, flags."""
    kind, gated, biased, score_position, transposed, interleaved = layout
    tokens, slots, count, hidden, inner = sizes
    x, scores = noise(tokens, hidden, dtype=dtype), noise(tokens, slots, seed=9).abs()
    weights = [
        None if w is None else w.to(torch.get_default_device())
        for w in layer(count, hidden, inner, gated, biased, transposed, dtype)
    ]
    ids = integers(0, count + 1, tokens, slots)
    return [x, scores], weights, torch.where(ids == 1, 0, ids), (kind, score_position, transposed, interleaved)


def calls(weights, flags, ids, recompute=False):
    """(op, oracle) of (x, scores, weights there are)."""
    there = [index for index, w in enumerate(weights) if w is not None]
    kind, score_position, transposed, interleaved = flags

    def spread(some):
        full = [None] * 4
        for index, w in zip(there, some, strict=True):
            full[index] = w
        return full

    def op(x, scores, *some):
        up, up_bias, down, down_bias = spread(some)
        plan = dispatch_plan(ids, up.shape[0])
        return experts(
            x, scores, up, down, plan, kind, up_bias=up_bias, down_bias=down_bias, score_position=score_position,
            transposed=transposed, interleaved=interleaved, recompute=recompute,
        )  # fmt: skip

    return op, lambda x, scores, *some: dense_experts(x, scores, *spread(some), ids, *flags)


@pytest.mark.parametrize(("tokens", "slots", "count", "tile"), PLANS)
def test_the_plan_is_the_specification_s(impl, tokens, slots, count, tile):
    ids = integers(-1, count + 1, tokens, slots)
    for one, other in zip(dispatch_plan(ids, count, tile), plans.dispatch_plan(ids.cpu(), count, tile), strict=True):
        assert torch.equal(one.cpu(), other)


@impl_and_dtype(FLOATS)
@pytest.mark.parametrize("router", ROUTERS)
def test_route(impl, dtype, router):
    count, k, score, groups, kept, best = router
    tokens = 11 if SMALL else 67
    logits = noise(tokens, count, dtype=dtype, scale=2.0)
    options = {"n_group": groups, "topk_group": kept, "experts_per_group_score": best, "norm_topk_prob": True}
    weights, ids = route(logits, k, score, **options)
    exact, _ = reference.route(logits.double().cpu(), None, ids.cpu(), k, score, groups, kept, best, True, 0.0, 1.0)
    assert_near(weights.cpu(), exact)
    # Of two scores that are nearer to each other than their rounding, either may be taken first.
    free = reference.route(logits.double().cpu(), None, None, k, score, groups, kept, best, True, 0.0, 1.0)[0]
    assert_near(weights.cpu(), free)
    leaf = logits.detach().requires_grad_()
    grad = noise(tokens, k, seed=1)
    (got,) = torch.autograd.grad(route(leaf, k, score, topk_ids=ids, **options)[0], leaf, grad)
    wanted = reference.route_backward(grad.double().cpu(), logits.double().cpu(), ids.cpu(), score, True, 0.0, 1.0)
    assert_near(got.cpu(), wanted)
    tied = torch.zeros(5, count, dtype=dtype)
    assert ids.shape == (tokens, k)
    assert route(tied, k, score, **options)[1].tolist() == [list(range(k))] * 5
    for part in subsets(tokens):
        assert_same_bits(route(logits[part], k, score, **options), (weights[part], ids[part]))


@impl_and_dtype(FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS[:1] if SMALL else LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_experts(impl, dtype, layout, sizes):
    rows, weights, ids, flags = made(layout, sizes, dtype)
    op, oracle = calls(weights, flags, ids)
    params, grad = [w for w in weights if w is not None], [noise(*rows[0].shape, dtype=dtype, seed=3)]
    got = evaluate(op, rows, params, grad)
    exact = evaluate(oracle, doubles(*rows), doubles(*params), doubles(*grad))
    # Rounded on the way, where that is 16 bits: the pre-activation, the activation and a row's output, and the like.
    half = 0.0 if dtype == torch.float32 else 4 * UNIT[dtype]
    for values, wanted in zip(got, exact, strict=True):
        for value, one in zip(values, wanted, strict=True):
            assert_near(value, one, extra=4 * matrix_noise(dtype) + half, units=2.0)
    for values, again in zip(got, evaluate(op, rows, params, grad), strict=True):
        assert_same_bits(values, again)
    assert all(int(torch.count_nonzero(g[1])) == 0 for g in got[2])  # of the expert without rows


@impl_and_dtype([torch.float32, HALF], [NATIVE, TRITON])
@pytest.mark.parametrize("layout", LAYOUTS[:1] if SMALL else [LAYOUTS[0], LAYOUTS[3], LAYOUTS[5]])
def test_a_token_keeps_its_bits(impl, dtype, layout):
    rows, weights, ids, flags = made(layout, SIZES[0], dtype)
    params, grad = [w for w in weights if w is not None], noise(*rows[0].shape, dtype=dtype, seed=3)

    def both(part):
        found = evaluate(calls(weights, flags, ids[part])[0], [r[part] for r in rows], params, [grad[part]])
        return [*found[0], *found[1]]

    whole = both(slice(None))
    for part in subsets(len(ids)):
        assert_same_bits(both(part), [one[part] for one in whole])
    rows[0][3] = math.nan
    others = torch.arange(len(ids)) != 3
    assert_same_bits([one[others] for one in both(slice(None))], [one[others] for one in whole])


@pytest.mark.parametrize("layout", LAYOUTS[1:2] if SMALL else LAYOUTS)
def test_recomputation_has_the_same_bits(impl, layout):
    """The pre-activation of the fused kernel is the grouped GEMM's for any tile of either."""
    rows, weights, ids, flags = made(layout, SIZES[0], HALF)
    params, grad = [w for w in weights if w is not None], [noise(*rows[0].shape, dtype=HALF, seed=3)]
    saved, again = (evaluate(calls(weights, flags, ids, re)[0], rows, params, grad) for re in (False, True))
    for values, wanted in zip(again, saved, strict=True):
        assert_same_bits(values, wanted)


@impl_and_dtype([torch.float32, HALF])
def test_the_parts_make_the_whole_and_other_tiles_of_a_plan_the_same_bits(impl, dtype):
    rows, weights, ids, flags = made(LAYOUTS[2], SIZES[0], dtype)
    (x, scores), (up, up_bias, down, down_bias), transposed = rows, weights, flags[2]
    whole = None
    for tile in (TILE, 5) if SMALL else (TILE, 16, 100, 256):
        plan = dispatch_plan(ids, up.shape[0], tile)
        z = grouped_linear(x, up, up_bias, plan, gather=True, transposed=transposed)
        gate, rest = z.double().tensor_split(2, -1)
        a = (torch.nn.functional.gelu(gate, approximate="tanh") * rest).to(dtype)
        out = combine(grouped_linear(a, down, down_bias, plan, transposed=transposed), plan[1], scores)
        whole = out if whole is None else whole
        assert torch.equal(out, whole)
    half = 0.0 if dtype == torch.float32 else 4 * UNIT[dtype]
    exact = calls(weights, flags, ids)[1](*doubles(*rows), *doubles(*weights))
    assert_near(whole, exact, extra=4 * matrix_noise(dtype) + half, units=2.0)


@needs_cuda
def test_nothing_waits_for_the_device(impl):
    rows, weights, ids, flags = made(LAYOUTS[0], SIZES[0], HALF)
    params, grad = [w for w in weights if w is not None], [noise(*rows[0].shape, dtype=HALF, seed=3)]
    op = calls(weights, flags, ids)[0]
    evaluate(op, rows, params, grad)  # compiled now
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(op, rows, params, grad)
        route(rows[0], 4, norm_topk_prob=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_weights_past_two_to_the_31_elements(impl):
    """The last of so many experts that its weights lie past 2^31 elements."""
    count, hidden, inner = 1030, 1024, 1024
    up = torch.zeros(count, 2 * inner, hidden, dtype=HALF)
    down = torch.zeros(count, hidden, inner, dtype=HALF)
    up[-1], down[-1] = noise(2 * inner, hidden, dtype=HALF), noise(hidden, inner, dtype=HALF, seed=1)
    x, scores = (
        noise(9, hidden, dtype=HALF, seed=2, scale=hidden**-0.5),
        torch.ones(9, 1),
    )
    last = torch.full((9, 1), count - 1)
    far = experts(x, scores, up, down, dispatch_plan(last, count), "silu")
    near = experts(x, scores, up[-1:].clone(), down[-1:].clone(), dispatch_plan(last * 0, 1), "silu")
    assert up.numel() > 1 << 31
    assert torch.equal(far, near)
    del up, down
    torch.cuda.empty_cache()
