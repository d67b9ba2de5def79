"""grouped_linear and combine: against float64, their gradients, and that a row's bits depend on that row alone."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    Implementation,
    impl_and,
    impl_and_dtype,
    impl_dtype_and,
    implementations,
    only_interpreter,
    only_triton,
    parameter,
)
from tests.helpers.moe import ROUTINGS, gradients_of, routing
from tests.helpers.rowwise import THREADS, TOLERANCE, error, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.grouped_linear import combine, grouped_linear
from toolkit.ops.linear import linear

EXPERTS, SLOTS = 5, 2


def make(tokens: int, depth: int, outputs: int, *, gather: bool, transposed: bool = False,
         dtype: torch.dtype = torch.float32) -> list[Tensor]:  # fmt: skip
    """x, weight and bias."""
    weight = seeded(EXPERTS, outputs, depth, dtype=dtype, scale=depth**-0.5, seed=1)
    x = seeded(tokens if gather else tokens * SLOTS, depth, dtype=dtype)
    bias = seeded(EXPERTS, outputs, dtype=dtype, seed=2)
    return [x, weight.mT.contiguous() if transposed else weight, bias]


def near(impl: Implementation, dtype: torch.dtype) -> float:
    """The bound of ``error``: a kernel's gradients are sums of tens of terms, some rounded to 16 bits before."""
    return TOLERANCE[dtype] * (2 if impl is TRITON else 1)


def oracle(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, plan: tuple[Tensor, ...], gather: bool,
           transposed: bool) -> Tensor:  # fmt: skip
    """Slot by slot: row r is the slot order[r]."""
    rows = []
    for row, slot in enumerate(plan[0].tolist()):
        expert = int(ids.flatten()[slot])
        if expert == EXPERTS:
            rows.append(bias.new_zeros(bias.shape[1]))
            continue
        source, matrix = x[slot // SLOTS if gather else row], weight[expert]
        rows.append((source @ matrix if transposed else matrix @ source) + bias[expert])
    return torch.stack(rows) if rows else bias.new_zeros(0, bias.shape[1])


EVERY_SORT = ("empty experts", "skipped slots")  # routings that have every sort of expert and of pair
CASES = list(itertools.product(ROUTINGS, [False, True], [False, True]))  # routed, transposed, gather
LAYOUTS = list(itertools.product([False, True], [False, True]))


@impl_dtype_and("routed, transposed, gather", CASES, [case for case in CASES if case[0] in EVERY_SORT])
def test_outputs_and_every_gradient_match_fp64(impl, dtype, routed, transposed, gather):
    few = SMALL and impl is TRITON
    for tokens, depth, outputs in ((0, 7, 3), (1, 37, 11), (11, 33, 40) if few else (45, 37, 22), (30, 530, 33)):
        if few and depth > 40:
            continue
        ids = routing(routed, tokens, SLOTS, EXPERTS)
        plan = dispatch_plan(ids, EXPERTS)
        inputs = make(tokens, depth, outputs, gather=gather, transposed=transposed, dtype=dtype)
        leaves = [value.requires_grad_() for value in inputs]
        upcast = [value.detach().double().requires_grad_() for value in inputs]
        y = grouped_linear(*leaves, plan, gather=gather, transposed=transposed, impl=impl.option)
        exact = oracle(*upcast, ids, plan, gather, transposed)
        assert y.dtype == dtype
        assert error(y.detach(), exact.detach()) <= near(impl, dtype)
        assert not y[int(plan[2][-1]) :].any()
        grad = seeded(*y.shape, seed=3, dtype=dtype)
        for got, wanted in zip(gradients_of(y, leaves, grad), gradients_of(exact, upcast, grad.double())):
            assert got.dtype == dtype
            assert error(got, wanted) <= near(impl, dtype)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        parameter(one, dtype, marks=[pytest.mark.sweep] if one is REFERENCE and dtype == torch.float64 else [])
        for one in (REFERENCE, NATIVE)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ],
    indirect=["impl"],
)
def test_a_row_has_the_bits_of_linear(impl, dtype):
    """Any other rows, with or without gather, on 1 or 2 threads. Triton's tiles differ from those of ``linear``."""
    rng = random.Random(0)
    for depth, outputs in ((37, 22), (530, 40), (1024, 17)):
        x, weight, bias = make(450, depth, outputs, gather=True, dtype=dtype)
        dense = {}
        for n in (1, 2):
            with threads(n):
                dense[n] = [linear(x, weight[e], bias[e], impl=impl.option) for e in range(EXPERTS)]
        if impl is NATIVE:  # MKL's product, of the reference, may depend on the number of threads
            assert all(map(torch.equal, dense[1], dense[2]))
        for trial, routed in enumerate(ROUTINGS):
            tokens = rng.choice([1, 3, 40, 450])
            ids, chosen = routing(routed, tokens, SLOTS, EXPERTS, trial), torch.randperm(450)[:tokens]
            plan = dispatch_plan(ids, EXPERTS)
            slots = plan[0][: int(plan[2][-1])]
            for n in (1, 2):
                expected = torch.stack([dense[n][int(ids.flatten()[s])][chosen[s // SLOTS]] for s in slots])
                with threads(n):
                    y = grouped_linear(x[chosen], weight, bias, plan, gather=True, impl=impl.option)
                    assert torch.equal(y[: len(slots)], expected)
                    rows = x[chosen][plan[0] // SLOTS]
                    assert torch.equal(grouped_linear(rows, weight, bias, plan, impl=impl.option), y)


@impl_and("transposed", [False, True], [True])
def test_bits_of_a_row_do_not_depend_on_other_rows_or_on_the_plan_s_tiles(impl, transposed):
    few = SMALL and impl is TRITON
    rows, depth = (40, 70) if few else (300, 530)
    x, weight, bias = make(rows, depth, 40, gather=True, transposed=transposed)
    x[5] = torch.nan
    whole = {}
    for e in range(EXPERTS):
        plan = dispatch_plan(torch.full((rows, 1), e), EXPERTS)
        whole[e] = grouped_linear(x, weight, bias, plan, gather=True, transposed=transposed, impl=impl.option)
    for trial in range(3 if few else 6):
        with threads(THREADS[trial % len(THREADS)]):
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(trial))
            chosen = order[: [1, 33, rows, 2, 7, 150][trial]]
            ids = routing("uniform", len(chosen), SLOTS, EXPERTS, trial)
            plan = dispatch_plan(ids, EXPERTS, [16, 5, 40, 64, 64, 64][trial])
            y = grouped_linear(x[chosen], weight, bias, plan, gather=True, transposed=transposed, impl=impl.option)
            expected = torch.stack([whole[int(ids.flatten()[slot])][chosen[slot // SLOTS]] for slot in plan[0]])
            assert torch.equal(y.nan_to_num(), expected.nan_to_num())
            assert torch.equal(y.isfinite(), expected.isfinite())


# torch chooses the order of the reference's sums
@impl_and("gather, transposed", LAYOUTS, [(True, False), (False, True)], (NATIVE, TRITON))
def test_gradients_have_the_same_bits_on_every_run_and_any_threads(impl, gather, transposed):
    tokens = 20 if SMALL and impl is TRITON else 700
    inputs = make(tokens, 130 if tokens > 20 else 40, 70, gather=gather, transposed=transposed)
    plan = dispatch_plan(routing("skewed", tokens, SLOTS, EXPERTS), EXPERTS)
    grad = seeded(2 * tokens, 70, dtype=torch.float32, seed=5)

    def gradients(n: int) -> tuple[Tensor, ...]:
        with threads(n):
            leaves = [value.clone().requires_grad_() for value in inputs]
            y = grouped_linear(*leaves, plan, gather=gather, transposed=transposed)
            return torch.autograd.grad(y, leaves, grad)

    first = gradients(1)
    for n in (1, *THREADS):
        assert all(torch.equal(*pair) for pair in zip(first, gradients(n)))


def test_only_the_gradients_asked_for_and_experts_without_rows(impl):
    ids = torch.tensor([[1, 3], [3, 1], [1, 5]])
    plan = dispatch_plan(ids, EXPERTS)
    for wanted in range(1, 8):
        leaves = make(3, 7, 4, gather=True)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(wanted >> i & 1))
        grouped_linear(*leaves, plan, gather=True, impl=impl.option).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [bool(wanted >> i & 1) for i in range(3)]
        for leaf in leaves[1:]:
            assert leaf.grad is None or (not leaf.grad[[0, 2, 4]].any() and leaf.grad[[1, 3]].all())


def test_strides_do_not_change_bits(impl):
    x, weight, bias = make(24, 40, 22, gather=True)
    plan = dispatch_plan(routing("uniform", 12, SLOTS, EXPERTS), EXPERTS)
    for view_x, view_w, view_b in [
        (x[::2, :30], weight[:, :11, :30], bias[:, :11]),
        (x[::2, ::2], weight[:, ::2, ::2], bias[:, ::2]),
        (x[1::2], weight.mT.contiguous().mT, bias.T.contiguous().T),
        (x[:1].expand(12, 40), weight[:1].expand(EXPERTS, 22, 40), bias[:1].expand(EXPERTS, 22)),
    ]:
        got, expected = (
            grouped_linear(*inputs, plan, gather=True, impl=impl.option)
            for inputs in ((view_x, view_w, view_b), (view_x.contiguous(), view_w.contiguous(), view_b.contiguous()))
        )
        assert torch.equal(got, expected)


def test_a_weight_of_nan_stays_with_its_expert(impl):
    x, weight, bias = make(40, 37, 22, gather=True)
    ids = routing("uniform", 40, SLOTS, EXPERTS)
    plan = dispatch_plan(ids, EXPERTS)
    clean = grouped_linear(x, weight, bias, plan, gather=True, impl=impl.option)
    weight[2] = float("nan")
    x[7] = float("inf")
    y = grouped_linear(x, weight, bias, plan, gather=True, impl=impl.option)
    expert, token = ids.flatten()[plan[0]], plan[0] // SLOTS
    others = (expert != 2) & (token != 7)
    assert torch.equal(y[others], clean[others])
    assert bool(y[expert == 2].isnan().all())
    assert not bool(y[token == 7].isfinite().any())


@impl_and_dtype()
@pytest.mark.parametrize("scored", [None, torch.float32, torch.float16])
def test_combine_matches_fp64(impl, dtype, scored):
    """Rows and weights that no token takes are not read: they are NaN."""
    for tokens, width in ((0, 5), (1, 1), (40, 37), (2, 2100)):
        rows = dispatch_plan(routing("skipped slots", tokens, 3, EXPERTS), EXPERTS)[1]
        y = seeded(tokens * 3, width, dtype=dtype)
        y[~torch.isin(torch.arange(len(y)), rows)] = torch.nan
        weights = None
        if scored is not None:
            weights = torch.where(rows < 0, torch.nan, seeded(tokens, 3, dtype=scored, seed=1)).requires_grad_()
        y.requires_grad_()
        out = combine(y, rows, weights, impl=impl.option)
        upcast = [value.detach().double().requires_grad_() for value in ([y] if weights is None else [y, weights])]
        terms = torch.cat([upcast[0], upcast[0].new_zeros(1, width)])[rows]  # -1 is the row of zeros
        factor = 1 if scored is None else torch.where(rows < 0, 0.0, upcast[1])[..., None]
        exact = (terms * factor).sum(1)
        assert out.dtype == dtype
        assert error(out.detach(), exact.detach()) <= TOLERANCE[dtype]
        grad = seeded(tokens, width, dtype=dtype, seed=2)
        leaves = [y] if weights is None else [y, weights]
        found = gradients_of(out, leaves, grad)
        for leaf, got, wanted in zip(leaves, found, gradients_of(exact, upcast, grad.double())):
            assert got.dtype == leaf.dtype
            assert error(got, wanted) <= max(TOLERANCE[dtype], TOLERANCE[leaf.dtype])


def test_combine_of_a_token_does_not_depend_on_other_tokens(impl):
    y, rows = seeded(200, 45, dtype=torch.float32), torch.randperm(200)[:120].view(40, 3)
    rows[5] = -1
    weights = seeded(40, 3, dtype=torch.float32, seed=1)
    for scale in (None, weights):
        whole = combine(y, rows, scale, impl=impl.option)
        assert not whole[5].any()
        for n in THREADS:
            with threads(n):
                chosen = torch.randperm(40)[:13]
                assert torch.equal(combine(y, rows[chosen], None if scale is None else scale[chosen], impl=impl.option),
                                   whole[chosen])  # fmt: skip
    ascending = (y[rows[0, 0]] + y[rows[0, 1]]) + y[rows[0, 2]]
    assert torch.equal(combine(y, rows[:1], impl=impl.option)[0], ascending)


def test_wrong_arguments_are_one_sentence():
    x, weight, bias = make(6, 7, 4, gather=True)
    plan = dispatch_plan(routing("uniform", 6, SLOTS, EXPERTS), EXPERTS)
    for arguments, words in [
        ((x, weight[:4], bias), "weight must be"),
        ((x[:, :6], weight, bias), "x must be"),
        ((x, weight, bias[:, :3]), "bias must be"),
        ((x.double(), weight, bias), "grouped_linear needs one dtype"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            grouped_linear(*arguments, plan, gather=True)
    with pytest.raises(ToolkitError, match="combine needs y"):
        combine(x, plan[1], torch.ones(6, 3))


@implementations(NATIVE)
@pytest.mark.usefixtures("impl")
def test_plans_that_point_outside_of_their_rows():
    x, weight, bias = make(6, 7, 4, gather=True)
    order, rows, offsets, tiles = dispatch_plan(routing("uniform", 6, SLOTS, EXPERTS), EXPERTS)
    for bad in ((order + 20, rows, offsets), (order, rows + 20, offsets), (order, rows, offsets * 3)):
        with pytest.raises(RuntimeError, match="point outside of its 12 rows"):
            grouped_linear(x, weight, bias, (*bad, tiles), gather=True)
    with pytest.raises(IndexError, match="rows must be >= -1 and < 6, got 6"):
        combine(x, torch.full((1, 1), 6))


def test_no_tokens_and_no_experts(impl):
    for tokens, experts in ((0, 3), (4, 0)):
        plan = dispatch_plan(torch.zeros(tokens, 2, dtype=torch.int64), experts, 16)
        inputs = [seeded(*shape, dtype=torch.float32) for shape in ((tokens, 8), (experts, 5, 8), (experts, 5))]
        leaves = [value.requires_grad_() for value in inputs]
        y = grouped_linear(*leaves, plan, gather=True, impl=impl.option)
        assert torch.equal(y, torch.zeros(2 * tokens, 5))
        for leaf, grad in zip(leaves, gradients_of(y, leaves, torch.ones_like(y))):
            assert grad.shape == leaf.shape
            assert not grad.any()


def test_opcheck():
    ids = routing("skipped slots", 5, SLOTS, EXPERTS)
    plan = dispatch_plan(ids, EXPERTS)
    for needs in (False, True):
        for transposed in (False, True):
            x, weight, bias = (
                value.requires_grad_(needs) for value in make(5, 7, 4, gather=True, transposed=transposed)
            )
            torch.library.opcheck(torch.ops.toolkit.grouped_linear.default, (x, weight, bias, *plan, True, transposed))
        y, weights = (seeded(*s, dtype=torch.float32).requires_grad_(needs) for s in ((10, 6), (5, 2)))
        torch.library.opcheck(torch.ops.toolkit.combine.default, (y, plan[1], weights))
        torch.library.opcheck(torch.ops.toolkit.combine.default, (y, plan[1], None))
    x, weight, y, weights = (value.detach() for value in (x, weight, y, weights))
    torch.library.opcheck(
        torch.ops.toolkit.grouped_linear_backward.default,
        (torch.ones(10, 4), x, weight, *plan, True, True, True, True, False),
    )
    torch.library.opcheck(
        torch.ops.toolkit.combine_backward.default, (torch.ones(5, 6), y, plan[1], weights, True, True)
    )


@only_triton
@pytest.mark.usefixtures("impl")
def test_only_the_gradients_that_are_needed():
    x, weight, _ = make(7, 20, 16, gather=True)
    plan = dispatch_plan(routing("uniform", 7, SLOTS, EXPERTS), EXPERTS)
    grad = seeded(14, 16, dtype=x.dtype, seed=3)
    backward = torch.ops.toolkit.grouped_linear_backward
    whole = backward(grad, x, weight, *plan, True, False, True, True, True)
    for at in range(3):
        needs = [index == at for index in range(3)]
        for index, value in enumerate(backward(grad, x, weight, *plan, True, False, *needs)):
            assert torch.equal(value, whole[index]) if index == at else value.numel() == 0


@only_interpreter
@pytest.mark.usefixtures("impl")
def test_dtypes_are_named():
    x, weight, bias = make(4, 8, 5, gather=True)
    plan = dispatch_plan(routing("uniform", 4, SLOTS, EXPERTS), EXPERTS)
    for dtype, words in (
        (torch.float64, r"kernels of grouped_linear, got torch\.float64"),
        (torch.bfloat16, "got bfloat16 for grouped_linear"),
    ):
        with pytest.raises(ToolkitError, match=words):
            grouped_linear(x.to(dtype), weight.to(dtype), bias.to(dtype), plan, gather=True)
