"""route: the choice against plain Python, weights and gradients against float64, a token's bits its own."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import (
    NATIVE,
    SMALL,
    TRITON,
    impl_and,
    impl_and_dtype,
    implementations,
    only_triton,
)
from tests.helpers.rowwise import THREADS, check_repeatable, check_rows, error, integers, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.activation.kinds import find
from toolkit.ops.route import route

EXPERTS = 24
GROUPS = [(1, 1, 1), (4, 2, 2), (6, 3, 1), (3, 3, 2)]


def settings_of(score: str, groups: int, chosen: int, best: int, normalise: bool) -> dict[str, object]:
    """The keywords of a router: ``chosen`` of ``groups`` groups, by the sum of a group's ``best`` highest scores."""
    limits = {"n_group": groups, "topk_group": chosen, "experts_per_group_score": best}
    return {"scoring_func": score, "norm_topk_prob": normalise, **limits}


SETTINGS = [
    settings_of(score, *limits, normalise)
    for score, normalise, limits in product(("softmax", "sigmoid"), (False, True), GROUPS)
]
# experts, top_k, settings
ROUTERS = [
    *((EXPERTS, 5 if settings["n_group"] != 6 else 4, settings) for settings in SETTINGS),
    (1, 1, settings_of("softmax", 1, 1, 1, False)),
    (60, 4, settings_of("sigmoid", 6, 2, 2, True)),
    (160, 6, settings_of("softmax", 8, 3, 1, False)),
    (33, 33, settings_of("softplus", 1, 1, 1, True)),
    (24, 6, settings_of("sigmoid", 3, 2, 4, False)),
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


def scores_of(logits: Tensor, scoring_func: str) -> Tensor:
    return logits.softmax(-1) if scoring_func == "softmax" else find(scoring_func).value(logits)


def oracle(logits: Tensor, ids: Tensor, *, scoring_func: str = "softmax", norm_topk_prob: bool = False,
           eps: float = 0.0, routed_scaling_factor: float = 1.0, **_: object) -> Tensor:  # fmt: skip
    p = scores_of(logits.double(), scoring_func).gather(1, ids)
    return routed_scaling_factor * (p / (p.sum(1, keepdim=True) + eps) if norm_topk_prob else p)


@impl_and_dtype()
@pytest.mark.parametrize(("experts", "most", "settings"), ROUTERS, ids=str)
def test_choice_weights_and_gradient(impl, dtype, experts, most, settings):
    tokens = 19 if SMALL and impl is TRITON else 57
    for count, k, biased in (
        (0, min(3, most), False),
        (1, 1, True),
        (tokens, most, False),
        (tokens, max(most - 1, 1), True),
    ):
        logits = seeded(count, experts, dtype=dtype, scale=2).requires_grad_()
        bias = seeded(experts, dtype=dtype, seed=1, scale=0.2) if biased else None
        call = partial(route, logits, k, eps=1e-6, routed_scaling_factor=1.7, impl=impl.option, **settings)
        weights, ids = call(expert_bias=bias)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scores = scores_of(logits.detach().double(), settings["scoring_func"])
        values = scores if bias is None else scores + bias.double()
        limits = (settings["n_group"], settings["topk_group"], settings["experts_per_group_score"])
        assert ids.tolist() == [chosen_by_hand(row, k, *limits) for row in values.tolist()]
        leaf = logits.detach().double().requires_grad_()
        exact = oracle(leaf, ids, eps=1e-6, routed_scaling_factor=1.7, **settings)
        grad = seeded(count, k, dtype=weights.dtype, seed=2)
        # A few roundings of exp, a sum and two quotients; the gradient of a narrow type is rounded to it.
        bound = 1e-14 if dtype == torch.float64 else 1e-6
        assert error(weights.detach(), exact.detach()) <= bound
        replayed, taken = call(topk_ids=ids.flip(1))
        assert torch.equal(taken, ids.flip(1))
        assert error(replayed.detach().flip(1), exact.detach()) <= bound
        (got,) = torch.autograd.grad(weights, logits, grad)
        (wanted,) = torch.autograd.grad(exact, leaf, grad.double())
        assert got.dtype == dtype
        assert error(got, wanted) <= {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(dtype, 2 * bound)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck_of_the_reference(settings):
    logits = seeded(4, EXPERTS).requires_grad_()
    ids = route(logits.detach(), 3, impl="reference", **settings)[1]

    def weights(x: Tensor) -> Tensor:
        return route(x, 3, topk_ids=ids, eps=1e-3, routed_scaling_factor=1.3, impl="reference", **settings)[0]

    assert torch.autograd.gradcheck(weights, logits)


@impl_and("settings", SETTINGS, SETTINGS[::3])
def test_equal_values_go_to_the_lower_id(impl, settings):
    logits = integers(-1, 2, 40 if SMALL and impl is TRITON else 200, EXPERTS).float()
    limits = (settings["n_group"], settings["topk_group"], settings["experts_per_group_score"])
    for k in (1, 4, 8):
        ids = route(logits, k, impl=impl.option, **settings)[1]
        # Equal logits have equal scores: integer logits choose the same experts, except for sums of the best ones.
        values = logits
        if limits[2] > 1:
            every = torch.arange(EXPERTS).expand(len(logits), -1)
            values, _ = route(logits, EXPERTS, settings["scoring_func"], topk_ids=every, impl=impl.option)
        assert ids.tolist() == [chosen_by_hand(row, k, *limits) for row in values.tolist()]
    zeros = torch.zeros(3, EXPERTS)
    assert route(zeros, 5, impl=impl.option)[1].tolist() == [[0, 1, 2, 3, 4]] * 3


@impl_and("settings", SETTINGS, SETTINGS[::3])
def test_rows_of_nan_and_infinity_have_distinct_valid_ids(impl, settings):
    logits = seeded(40, EXPERTS, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for value in (float("nan"), float("inf"), float("-inf")):
        logits[torch.rand(40, EXPERTS, generator=generator) < 0.3] = value
    logits[0], logits[1], logits[2] = float("nan"), float("-inf"), float("inf")
    clean = torch.cat([seeded(5, EXPERTS, dtype=torch.float32, seed=3), logits])
    for k in (1, 6):
        ids = route(logits, k, impl=impl.option, **settings)[1]
        assert all(len(set(row)) == k and 0 <= min(row) <= max(row) < EXPERTS for row in ids.tolist())
        values = scores_of(logits, settings["scoring_func"]).tolist()
        limits = (settings["n_group"], settings["topk_group"], settings["experts_per_group_score"])
        assert ids.tolist() == [chosen_by_hand(row, k, *limits) for row in values]
        beside = route(clean, k, impl=impl.option, **settings)
        for got, wanted in zip(beside, route(clean[:5], k, impl=impl.option, **settings)):
            assert torch.equal(got[:5], wanted)
    bias = torch.full((EXPERTS,), float("nan"))
    assert route(logits[3:4], 3, "sigmoid", expert_bias=bias, impl=impl.option)[1].tolist() == [[0, 1, 2]]


def test_a_recorded_routing_is_taken_in_its_order(impl):
    logits = seeded(30, EXPERTS, dtype=torch.float32).requires_grad_()
    chosen = torch.rand(30, EXPERTS, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, ::6]
    assert not chosen.is_contiguous()
    weights, ids = route(logits, 4, topk_ids=chosen, norm_topk_prob=True, impl=impl.option)
    assert torch.equal(ids, chosen)
    assert error(weights.detach(), oracle(logits.detach(), chosen, norm_topk_prob=True)) <= 1e-6
    weights, ids = route(logits, 4, norm_topk_prob=True, impl=impl.option)
    again, _ = route(logits, 4, topk_ids=ids, norm_topk_prob=True, impl=impl.option)
    assert torch.equal(weights, again)


SIZED = list(product(SETTINGS[::3], [24, 132]))


@impl_and("settings, experts", SIZED, [SIZED[2], SIZED[9]])
def test_bits_of_a_token_do_not_depend_on_other_tokens(impl, settings, experts):
    tokens, experts = (24, min(experts, 36)) if SMALL and impl is TRITON else (150, experts)
    logits, bias = seeded(tokens, experts, dtype=torch.float32), seeded(experts, dtype=torch.float32, seed=4)
    check_rows(lambda x: route(x, 4, expert_bias=bias, impl=impl.option, **settings), [logits])
    check_repeatable(lambda x: route(x, 4, expert_bias=bias, impl=impl.option, **settings)[0], [logits])
    strided = torch.stack([logits, logits], -1)[..., 0]
    for got, wanted in zip(route(strided, 4, impl=impl.option), route(logits, 4, impl=impl.option)):
        assert torch.equal(got, wanted)


def test_bits_of_gradient_rows(impl):
    logits = seeded(60, EXPERTS, dtype=torch.float32)
    grad = seeded(60, 4, dtype=torch.float32, seed=1)

    def gradient(rows: Tensor) -> Tensor:
        leaf = logits[rows].requires_grad_()
        weights, _ = route(leaf, 4, norm_topk_prob=True, impl=impl.option)
        return torch.autograd.grad(weights, leaf, grad[rows])[0]

    whole = gradient(torch.arange(60))
    for n in THREADS:
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


@implementations(NATIVE)
def test_ids_of_no_expert(impl):
    with pytest.raises(IndexError, match="topk_ids must be >= 0 and < 8, got 8"):
        route(torch.zeros(3, 8), 2, topk_ids=torch.full((3, 2), 8), impl=impl.option)


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


@only_triton
@pytest.mark.usefixtures("impl")
def test_no_rows_and_a_dtype_that_is_named():
    weights, ids = route(torch.zeros(0, 8), 2)
    assert weights.shape == ids.shape == (0, 2)
    with pytest.raises(ToolkitError, match=r"kernels of route, got torch\.float64"):
        route(torch.zeros(1, 8).double(), 2)
