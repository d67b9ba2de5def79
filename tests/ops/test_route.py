"""route: the choice against plain Python, weights and gradients against float64, a token's bits its own."""

from itertools import product

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import only_triton
from tests.helpers.interpreter import DTYPES, close, noise, rows_alone
from tests.helpers.rowwise import check_repeatable, check_rows, error, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.activation.kinds import find
from toolkit.ops.registry import has_native
from toolkit.ops.route import reference, route

IMPLEMENTATIONS = ["reference", "cpu"] if has_native("route") else ["reference"]
EXPERTS = 24
GROUPS = [(1, 1, 1), (4, 2, 2), (6, 3, 1), (3, 3, 2)]
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
SETTINGS = [
    {
        "scoring_func": score,
        "norm_topk_prob": normalise,
        "n_group": groups,
        "topk_group": kept,
        "experts_per_group_score": best,
    }
    for score, normalise, (groups, kept, best) in product(("softmax", "sigmoid"), (False, True), GROUPS)
]


def key(value: float) -> float:
    return float("-inf") if value != value else value


def chosen_by_hand(values: list[float], k: int, groups: int, kept: int, best: int) -> list[int]:
    """Places of the k highest values in the groups that are kept; of equal ones the lowest."""
    size = len(values) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    sums = [sum(sorted((values[e] for e in group), key=key, reverse=True)[:best]) for group in members]
    order = sorted(range(groups), key=lambda g: (-key(sums[g]), g))[:kept]
    candidates = [e for g in sorted(order) for e in members[g]]
    return sorted(candidates, key=lambda e: (-key(values[e]), e))[:k]


def oracle(logits: Tensor, ids: Tensor, *, scoring_func: str = "softmax", norm_topk_prob: bool = False,
           eps: float = 0.0, routed_scaling_factor: float = 1.0, **_: object) -> Tensor:  # fmt: skip
    upcast = logits.double()
    p = (upcast.softmax(-1) if scoring_func == "softmax" else upcast.sigmoid()).gather(1, ids)
    return routed_scaling_factor * (p / (p.sum(1, keepdim=True) + eps) if norm_topk_prob else p)


@every_impl
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_choice_weights_and_gradient(impl, settings, dtype):
    for tokens, k, biased in ((0, 3, False), (1, 1, True), (57, 5, False), (57, 4, True)):
        logits = seeded(tokens, EXPERTS, dtype=dtype, scale=2).requires_grad_()
        bias = seeded(EXPERTS, seed=1, scale=0.2).to(dtype) if biased else None
        weights, ids = route(logits, k, expert_bias=bias, eps=1e-6, routed_scaling_factor=1.7, impl=impl, **settings)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        upcast = logits.detach().double()
        scores = upcast.softmax(-1) if settings["scoring_func"] == "softmax" else upcast.sigmoid()
        values = scores if bias is None else scores + bias.double()
        limits = (settings["n_group"], settings["topk_group"], settings["experts_per_group_score"])
        assert ids.tolist() == [chosen_by_hand(row, k, *limits) for row in values.tolist()]
        leaf = logits.detach().double().requires_grad_()
        exact = oracle(leaf, ids, eps=1e-6, routed_scaling_factor=1.7, **settings)
        grad = seeded(tokens, k, seed=2).to(weights.dtype)
        # A few roundings of exp, a sum of 24 and two quotients; the gradient of a narrow type is rounded to it.
        bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
        assert error(weights.detach(), exact.detach()) <= bound
        (got,) = torch.autograd.grad(weights, logits, grad)
        (wanted,) = torch.autograd.grad(exact, leaf, grad.double())
        assert got.dtype == dtype
        assert error(got, wanted) <= (4e-3 if dtype == torch.bfloat16 else bound)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck_of_the_reference(settings):
    logits = seeded(4, EXPERTS).requires_grad_()
    ids = route(logits.detach(), 3, impl="reference", **settings)[1]

    def weights(x: Tensor) -> Tensor:
        return route(x, 3, topk_ids=ids, eps=1e-3, routed_scaling_factor=1.3, impl="reference", **settings)[0]

    assert torch.autograd.gradcheck(weights, logits)


@every_impl
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equal_values_go_to_the_lower_id(impl, settings):
    logits = torch.randint(-1, 2, (200, EXPERTS), generator=torch.Generator().manual_seed(0)).float()
    limits = (settings["n_group"], settings["topk_group"], settings["experts_per_group_score"])
    for k in (1, 4, 8):
        ids = route(logits, k, impl=impl, **settings)[1]
        # Equal logits have equal scores: integer logits choose the same experts, except for sums of the best ones.
        values = logits if limits[2] == 1 else route(logits, EXPERTS, settings["scoring_func"], impl=impl,
                                                     topk_ids=torch.arange(EXPERTS).expand(200, -1))[0]  # fmt: skip
        assert ids.tolist() == [chosen_by_hand(row, k, *limits) for row in values.tolist()]
    zeros = torch.zeros(3, EXPERTS)
    assert route(zeros, 5, impl=impl)[1].tolist() == [[0, 1, 2, 3, 4]] * 3


@every_impl
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_of_nan_and_infinity_have_distinct_valid_ids(impl, settings):
    logits = seeded(40, EXPERTS, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for value in (float("nan"), float("inf"), float("-inf")):
        logits[torch.rand(40, EXPERTS, generator=generator) < 0.3] = value
    logits[0], logits[1], logits[2] = float("nan"), float("-inf"), float("inf")
    clean = torch.cat([seeded(5, EXPERTS, dtype=torch.float32, seed=3), logits])
    for k in (1, 6):
        ids = route(logits, k, impl=impl, **settings)[1]
        assert all(len(set(row)) == k and 0 <= min(row) <= max(row) < EXPERTS for row in ids.tolist())
        assert torch.equal(ids, route(logits, k, impl="reference", **settings)[1])
        beside = route(clean, k, impl=impl, **settings)
        for got, wanted in zip(beside, route(clean[:5], k, impl=impl, **settings)):
            assert torch.equal(got[:5], wanted)
    bias = torch.full((EXPERTS,), float("nan"))
    assert route(logits[3:4], 3, "sigmoid", expert_bias=bias, impl=impl)[1].tolist() == [[0, 1, 2]]


@every_impl
def test_a_recorded_routing_is_taken_in_its_order(impl):
    logits = seeded(30, EXPERTS, dtype=torch.float32).requires_grad_()
    chosen = torch.rand(30, EXPERTS, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, ::6]
    assert not chosen.is_contiguous()
    weights, ids = route(logits, 4, topk_ids=chosen, norm_topk_prob=True, impl=impl)
    assert torch.equal(ids, chosen)
    assert error(weights.detach(), oracle(logits.detach(), chosen, norm_topk_prob=True)) <= 1e-6
    weights, ids = route(logits, 4, norm_topk_prob=True, impl=impl)
    again, _ = route(logits, 4, topk_ids=ids, norm_topk_prob=True, impl=impl)
    assert torch.equal(weights, again)


@every_impl
@pytest.mark.parametrize("settings", SETTINGS[::3], ids=str)
@pytest.mark.parametrize("experts", [24, 132])
def test_a_token_keeps_its_bits(impl, settings, experts):
    logits, bias = seeded(150, experts, dtype=torch.float32), seeded(experts, dtype=torch.float32, seed=4)
    check_rows(lambda x: route(x, 4, expert_bias=bias, impl=impl, **settings), [logits])
    check_repeatable(lambda x: route(x, 4, expert_bias=bias, impl=impl, **settings)[0], [logits])
    strided = torch.stack([logits, logits], -1)[..., 0]
    for got, wanted in zip(route(strided, 4, impl=impl), route(logits, 4, impl=impl)):
        assert torch.equal(got, wanted)


@every_impl
def test_gradient_rows_keep_their_bits(impl):
    logits = seeded(60, EXPERTS, dtype=torch.float32)
    grad = seeded(60, 4, dtype=torch.float32, seed=1)

    def gradient(rows: Tensor) -> Tensor:
        leaf = logits[rows].requires_grad_()
        weights, _ = route(leaf, 4, norm_topk_prob=True, impl=impl)
        return torch.autograd.grad(weights, leaf, grad[rows])[0]

    whole = gradient(torch.arange(60))
    for n in (1, 2):
        with threads(n):
            rows = torch.randperm(60, generator=torch.Generator().manual_seed(n))[:17]
            assert torch.equal(gradient(rows), whole[rows])


def test_wrong_arguments_are_one_sentence():
    logits = torch.zeros(3, 8)
    for arguments, words in [
        ({"top_k": 9}, "top_k must be >= 1 and <= E for logits .*, got 9"),
        ({"top_k": 0}, "top_k must be >= 1 and <= E for logits .*, got 0"),
        ({"top_k": 2, "scoring_func": "no"}, "no"),
        ({"top_k": 2, "n_group": 3}, "n_group must be >= 1 and divide the 8 experts, got 3"),
        ({"top_k": 5, "n_group": 4, "topk_group": 2}, "top_k must be <= 4, the experts of 2 groups of 2, got 5"),
        ({"top_k": 2, "expert_bias": torch.zeros(7)}, r"expert_bias must be \[8\], got \[7\]"),
        ({"top_k": 2, "topk_ids": torch.zeros(3, 3, dtype=torch.int64)}, r"topk_ids must be \[3, 2\], got \[3, 3\]"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            route(logits, **arguments)
    if has_native("route"):
        with pytest.raises(IndexError, match="topk_ids must be >= 0 and < 8, got 8"):
            route(logits, 2, topk_ids=torch.full((3, 2), 8))


def test_opcheck():
    logits, bias = seeded(5, 8, dtype=torch.float32), torch.zeros(8)
    for x in (logits, logits.clone().requires_grad_()):
        torch.library.opcheck(
            torch.ops.toolkit.route.default, (x, bias, None, 3, "softmax", 4, 2, 2, True, 1e-6, 2.0)
        )  # fmt: skip
        ids = route(logits, 3)[1]
        torch.library.opcheck(torch.ops.toolkit.route.default, (x, None, ids, 3, "sigmoid", 1, 1, 1, False, 0.0, 1.0))
    torch.library.opcheck(
        torch.ops.toolkit.route_backward.default, (torch.ones(5, 3), logits, ids, "softmax", True, 0.0, 1.0)
    )


# The Triton launchers: their tiles, splits and limits.
launch_route = torch.ops.toolkit.route
route_backward = torch.ops.toolkit.route_backward


NONE, BIG = float("nan"), float("inf")


# experts, k, score, groups, kept groups, best of a group, normalise
ROUTERS = [
    (1, 1, "softmax", 1, 1, 1, False),
    (8, 2, "softmax", 1, 1, 1, True),
    (60, 4, "sigmoid", 6, 2, 2, True),
    (160, 6, "softmax", 8, 3, 1, False),
    (33, 33, "softplus", 1, 1, 1, True),
    (24, 6, "sigmoid", 3, 2, 4, False),
]


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", ROUTERS)
def test_choice_weights_and_gradients(dtype, router):
    experts, k, score, groups, kept, best, normalise = router
    logits, bias = noise(19, experts, dtype=dtype, scale=2.0), noise(experts, scale=0.1, seed=1)
    flags, rest = (k, score, groups, kept, best), (normalise, 1e-6, 1.7)
    for shift in (None, bias):
        weights, ids = launch_route(logits, shift, None, *flags, *rest)
        exact, wanted = reference.route(logits.double(), shift, None, *flags, *rest)
        assert torch.equal(ids, wanted)
        assert weights.dtype == torch.float32
        close(weights, exact, 1e-6)
    again, taken = launch_route(logits, None, ids.flip(1), *flags, *rest)
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


@only_triton
@pytest.mark.usefixtures("impl")
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
            (weights, ids), (exact, wanted) = launch_route(*arguments), reference.route(*arguments)
            assert torch.equal(ids, wanted)
            torch.testing.assert_close(weights, exact, rtol=1e-6, atol=1e-7, equal_nan=True)


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("router", ROUTERS[1:4])
def test_a_row_keeps_its_bits(router):
    experts, k, score, groups, kept, best, normalise = router
    logits, grad = noise(11, experts), noise(11, k, seed=1)

    def both(rows, upstream):
        weights, ids = launch_route(rows, None, None, k, score, groups, kept, best, normalise, 0.0, 1.0)
        return weights, ids, route_backward(upstream, rows, ids, score, normalise, 0.0, 1.0)

    rows_alone(both, [logits, grad])
    joined = torch.cat([logits, logits], -1)[:, experts:]
    assert all(torch.equal(*pair) for pair in zip(both(joined, grad), both(logits, grad), strict=True))


@only_triton
@pytest.mark.usefixtures("impl")
def test_no_rows_and_bad_input():
    weights, ids = launch_route(torch.zeros(0, 8), None, None, 2, "softmax", 1, 1, 1, True, 0.0, 1.0)
    assert weights.shape == ids.shape == (0, 2)
    assert route_backward(weights, torch.zeros(0, 8), ids, "softmax", True, 0.0, 1.0).shape == (0, 8)
    with pytest.raises(ToolkitError, match=r"kernels of route, got torch\.float64"):
        launch_route(torch.zeros(1, 8).double(), None, None, 2, "softmax", 1, 1, 1, True, 0.0, 1.0)
