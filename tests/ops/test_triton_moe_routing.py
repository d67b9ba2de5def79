"""Triton dispatch_plan and route in Triton's interpreter."""

import itertools

import pytest
import torch

from tests.helpers.interpreter import DTYPES, close, noise, poisoned, rows_alone
from tests.helpers.moe_dense import routing
from toolkit.errors import ToolkitError
from toolkit.ops.activation.kinds import find
from toolkit.ops.dispatch_plan import reference as plans
from toolkit.ops.dispatch_plan.triton import dispatch_plan
from toolkit.ops.route import reference
from toolkit.ops.route.triton import route, route_backward

NONE, BIG = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned():
    with poisoned():
        yield


def listed(ids, count, tile):
    """The plan in Python."""
    flat = ids.flatten().tolist()
    flat = [one if 0 <= one < count else count for one in flat]
    order = sorted(range(len(flat)), key=lambda slot: flat[slot])
    rows = [-1] * len(flat)
    for row, slot in enumerate(order):
        rows[slot] = row if flat[slot] < count else -1
    offsets = [sum(one < expert for one in flat) for expert in range(count + 1)]
    tiles = [
        [expert, first]
        for expert, (begin, end) in enumerate(itertools.pairwise(offsets))
        for first in range(begin, end, tile)
    ]
    bound = len(flat) // tile + min(count, len(flat))
    tiles += [[count, offsets[-1]]] * (bound - len(tiles))
    shapes = (len(flat),), ids.shape, (count + 1,), (bound, 2)
    return [torch.tensor(v, dtype=torch.int64).reshape(s) for v, s in zip((order, rows, offsets, tiles), shapes)]


@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "tile"),
    [
        (0, 2, 4, 4), (3, 0, 4, 4), (1, 1, 1, 1), (7, 2, 5, 3), (40, 4, 9, 8), (90, 3, 7, 16), (64, 1, 3, 64),
        (33, 8, 128, 64), (5, 2, 0, 4), (70, 130, 20, 300),
    ],
)  # fmt: skip
def test_the_plan_is_the_specification_s(tokens, slots, experts, tile):
    ids = routing(tokens, slots, experts) if experts else torch.zeros(tokens, slots, dtype=torch.int64)
    ids[::3] -= 1  # -1 is skipped as experts is
    got, wanted = dispatch_plan(ids, experts, tile), plans.dispatch_plan(ids, experts, tile)
    for one, other, third in zip(got, wanted, listed(ids, experts, tile), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_all_slots_of_one_expert_or_of_none():
    for expert in (0, 6, 7, -5):
        ids = torch.full((50, 3), expert)
        for one, other in zip(dispatch_plan(ids, 7, 16), plans.dispatch_plan(ids, 7, 16), strict=True):
            assert torch.equal(one, other)
    ids = routing(20, 4, 6)
    for one, other in zip(dispatch_plan(ids.T.contiguous().T, 6, 8), plans.dispatch_plan(ids, 6, 8), strict=True):
        assert torch.equal(one, other)


# experts, k, score, groups, kept groups, best of a group, normalise
ROUTERS = [
    (1, 1, "softmax", 1, 1, 1, False),
    (8, 2, "softmax", 1, 1, 1, True),
    (60, 4, "sigmoid", 6, 2, 2, True),
    (160, 6, "softmax", 8, 3, 1, False),
    (33, 33, "softplus", 1, 1, 1, True),
    (24, 6, "sigmoid", 3, 2, 4, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", ROUTERS)
def test_choice_weights_and_gradients(dtype, router):
    experts, k, score, groups, kept, best, normalise = router
    logits, bias = noise(19, experts, dtype=dtype, scale=2.0), noise(experts, scale=0.1, seed=1)
    flags, rest = (k, score, groups, kept, best), (normalise, 1e-6, 1.7)
    for shift in (None, bias):
        weights, ids = route(logits, shift, None, *flags, *rest)
        exact, wanted = reference.route(logits.double(), shift, None, *flags, *rest)
        assert torch.equal(ids, wanted)
        assert weights.dtype == torch.float32
        close(weights, exact, 1e-6)
    again, taken = route(logits, None, ids.flip(1), *flags, *rest)
    assert torch.equal(taken, ids.flip(1))
    close(again.flip(1), exact, 1e-6)
    grad, leaf = noise(19, k, seed=2), logits.double().requires_grad_()
    p = torch.softmax(leaf, -1) if score == "softmax" else find(score).value(leaf)
    chosen = p.gather(-1, ids)
    out = 1.7 * (chosen / (chosen.sum(-1, keepdim=True) + 1e-6) if normalise else chosen)
    (exact,) = torch.autograd.grad(out, leaf, grad.double())
    got = route_backward(grad, logits, ids, score, *rest)
    assert got.dtype == dtype
    close(got, exact, {torch.float32: 2e-6, torch.float16: 2**-10}[dtype])


@pytest.mark.parametrize("router", ROUTERS[:4])
def test_ties_nan_and_infinities_choose_as_specified(router):
    experts, k, _, groups, kept, best, _ = router
    generator = torch.Generator().manual_seed(3)
    values = torch.tensor([-BIG, -1.0, -0.0, 0.0, 1.0, BIG, NONE])
    logits = values[torch.randint(0, 7, (14, experts), generator=generator)]
    logits[1], logits[2], logits[3] = NONE, -BIG, 0.0
    for score in ("relu2", "softmax"):
        for bias in (None, values[torch.randint(1, 5, (experts,), generator=generator)]):
            arguments = (logits, bias, None, k, score, groups, kept, best, False, 0.0, 1.0)
            (weights, ids), (exact, wanted) = route(*arguments), reference.route(*arguments)
            assert torch.equal(ids, wanted)
            torch.testing.assert_close(weights, exact, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("router", ROUTERS[1:4])
def test_a_row_keeps_its_bits(router):
    experts, k, score, groups, kept, best, normalise = router
    logits, grad = noise(11, experts), noise(11, k, seed=1)

    def both(rows, upstream):
        weights, ids = route(rows, None, None, k, score, groups, kept, best, normalise, 0.0, 1.0)
        return weights, ids, route_backward(upstream, rows, ids, score, normalise, 0.0, 1.0)

    rows_alone(both, [logits, grad])
    wide = torch.cat([logits, logits], -1)[:, experts:]
    assert all(torch.equal(*pair) for pair in zip(both(wide, grad), both(logits, grad), strict=True))


def test_no_rows_and_bad_input():
    weights, ids = route(torch.zeros(0, 8), None, None, 2, "softmax", 1, 1, 1, True, 0.0, 1.0)
    assert weights.shape == ids.shape == (0, 2)
    assert route_backward(weights, torch.zeros(0, 8), ids, "softmax", True, 0.0, 1.0).shape == (0, 8)
    with pytest.raises(ToolkitError, match=r"route got dtype torch\.float64"):
        route(torch.zeros(1, 8).double(), None, None, 2, "softmax", 1, 1, 1, True, 0.0, 1.0)
