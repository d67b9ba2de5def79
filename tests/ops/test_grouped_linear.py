"""grouped_linear and combine: against float64, their gradients, and that a row's bits depend on that row alone."""

import random

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import only_triton
from tests.helpers.interpreter import DTYPES, close
from tests.helpers.interpreter import TOLERANCE as TOLERANCE_of_triton
from tests.helpers.moe import ROUTINGS, gradients_of, routing
from tests.helpers.moe_dense import normal
from tests.helpers.moe_dense import routing as routing_of_triton
from tests.helpers.rowwise import TOLERANCE, error, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.grouped_linear import combine, grouped_linear, reference
from toolkit.ops.linear import linear
from toolkit.ops.registry import has_native

IMPLEMENTATIONS = ["reference", "cpu"] if has_native("grouped_linear") else ["reference"]
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
EXPERTS, SLOTS = 5, 2


def make(tokens: int, depth: int, outputs: int, *, gather: bool, transposed: bool = False,
         dtype: torch.dtype = torch.float32) -> list[Tensor]:  # fmt: skip
    """x, weight and bias."""
    weight = seeded(EXPERTS, outputs, depth, scale=depth**-0.5, seed=1)
    x = seeded(tokens if gather else tokens * SLOTS, depth)
    return [value.to(dtype) for value in (x, weight.mT.contiguous() if transposed else weight,
                                          seeded(EXPERTS, outputs, seed=2))]  # fmt: skip


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


@every_impl
@pytest.mark.parametrize("routed", ROUTINGS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_every_gradient_match_fp64(impl, routed, transposed, gather, dtype):
    for tokens, depth, outputs in ((0, 7, 3), (1, 37, 11), (45, 37, 22), (30, 530, 33)):
        ids = routing(routed, tokens, SLOTS, EXPERTS)
        plan = dispatch_plan(ids, EXPERTS)
        inputs = make(tokens, depth, outputs, gather=gather, transposed=transposed, dtype=dtype)
        leaves = [value.requires_grad_() for value in inputs]
        upcast = [value.detach().double().requires_grad_() for value in inputs]
        y = grouped_linear(*leaves, plan, gather=gather, transposed=transposed, impl=impl)
        exact = oracle(*upcast, ids, plan, gather, transposed)
        assert y.dtype == dtype
        assert error(y.detach(), exact.detach()) <= TOLERANCE[dtype]
        grad = seeded(*y.shape, seed=3, dtype=dtype)
        for got, wanted in zip(gradients_of(y, leaves, grad), gradients_of(exact, upcast, grad.double())):
            assert got.dtype == dtype
            assert error(got, wanted) <= TOLERANCE[dtype]


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_has_the_bits_of_linear(impl, dtype):
    """Any neighbours, with or without gather, on 1 or 2 threads."""
    rng = random.Random(0)
    for depth, outputs in ((37, 22), (530, 40), (1024, 17)):
        x, weight, bias = make(450, depth, outputs, gather=True, dtype=dtype)
        dense = {}
        for n in (1, 2):
            with threads(n):
                dense[n] = [linear(x, weight[e], bias[e], impl=impl) for e in range(EXPERTS)]
        if impl == "cpu":  # MKL's product, of the reference, may depend on the number of threads
            assert all(map(torch.equal, dense[1], dense[2]))
        for trial, routed in enumerate(ROUTINGS):
            tokens = rng.choice([1, 3, 40, 450])
            ids, chosen = routing(routed, tokens, SLOTS, EXPERTS, trial), torch.randperm(450)[:tokens]
            plan = dispatch_plan(ids, EXPERTS)
            slots = plan[0][: int(plan[2][-1])]
            for n in (1, 2):
                expected = torch.stack([dense[n][int(ids.flatten()[s])][chosen[s // SLOTS]] for s in slots])
                with threads(n):
                    y = grouped_linear(x[chosen], weight, bias, plan, gather=True, impl=impl)
                    assert torch.equal(y[: len(slots)], expected)
                    rows = x[chosen][plan[0] // SLOTS]
                    assert torch.equal(grouped_linear(rows, weight, bias, plan, impl=impl), y)


@every_impl
def test_a_row_of_transposed_weights_keeps_its_bits(impl):
    x, weight, bias = make(300, 530, 40, gather=True, transposed=True)
    whole = {}
    for e in range(EXPERTS):
        plan = dispatch_plan(torch.full((300, 1), e), EXPERTS)
        whole[e] = grouped_linear(x, weight, bias, plan, gather=True, transposed=True, impl=impl)
    for trial in range(6):
        with threads(trial % 2 + 1):
            chosen = torch.randperm(300, generator=torch.Generator().manual_seed(trial))[
                : [1, 2, 7, 33, 150, 300][trial]
            ]
            ids = routing("uniform", len(chosen), SLOTS, EXPERTS, trial)
            plan = dispatch_plan(ids, EXPERTS)
            y = grouped_linear(x[chosen], weight, bias, plan, gather=True, transposed=True, impl=impl)
            expected = [whole[int(ids.flatten()[slot])][chosen[slot // SLOTS]] for slot in plan[0]]
            assert torch.equal(y, torch.stack(expected))


@pytest.mark.skipif(not has_native("grouped_linear"), reason="the order of sums is a promise of the native kernel")
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_have_the_same_bits_on_every_run_and_any_threads(gather, transposed):
    inputs = make(700, 130, 70, gather=gather, transposed=transposed)
    plan = dispatch_plan(routing("skewed", 700, SLOTS, EXPERTS), EXPERTS)
    grad = seeded(1400, 70, dtype=torch.float32, seed=5)

    def gradients(n: int) -> tuple[Tensor, ...]:
        with threads(n):
            leaves = [value.clone().requires_grad_() for value in inputs]
            return torch.autograd.grad(
                grouped_linear(*leaves, plan, gather=gather, transposed=transposed), leaves, grad
            )

    first = gradients(1)
    for n in (1, 2, 2):
        assert all(torch.equal(*pair) for pair in zip(first, gradients(n)))


@every_impl
def test_only_the_gradients_asked_for_and_experts_without_rows(impl):
    ids = torch.tensor([[1, 3], [3, 1], [1, 5]])
    plan = dispatch_plan(ids, EXPERTS)
    for wanted in range(1, 8):
        leaves = make(3, 7, 4, gather=True)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(wanted >> i & 1))
        grouped_linear(*leaves, plan, gather=True, impl=impl).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [bool(wanted >> i & 1) for i in range(3)]
        for leaf in leaves[1:]:
            assert leaf.grad is None or (not leaf.grad[[0, 2, 4]].any() and leaf.grad[[1, 3]].all())


@every_impl
def test_strides_do_not_change_bits(impl):
    x, weight, bias = make(24, 40, 22, gather=True)
    plan = dispatch_plan(routing("uniform", 12, SLOTS, EXPERTS), EXPERTS)
    for view_x, view_w, view_b in [
        (x[::2, :30], weight[:, :11, :30], bias[:, :11]),
        (x[::2, ::2], weight[:, ::2, ::2], bias[:, ::2]),
        (x[1::2], weight.mT.contiguous().mT, bias.T.contiguous().T),
        (x[:1].expand(12, 40), weight[:1].expand(EXPERTS, 22, 40), bias[:1].expand(EXPERTS, 22)),
    ]:
        expected = grouped_linear(
            view_x.contiguous(), view_w.contiguous(), view_b.contiguous(), plan, gather=True, impl=impl
        )
        assert torch.equal(grouped_linear(view_x, view_w, view_b, plan, gather=True, impl=impl), expected)


@every_impl
def test_a_weight_of_nan_stays_with_its_expert(impl):
    x, weight, bias = make(40, 37, 22, gather=True)
    ids = routing("uniform", 40, SLOTS, EXPERTS)
    plan = dispatch_plan(ids, EXPERTS)
    clean = grouped_linear(x, weight, bias, plan, gather=True, impl=impl)
    weight[2] = float("nan")
    x[7] = float("inf")
    y = grouped_linear(x, weight, bias, plan, gather=True, impl=impl)
    expert, token = ids.flatten()[plan[0]], plan[0] // SLOTS
    others = (expert != 2) & (token != 7)
    assert torch.equal(y[others], clean[others])
    assert bool(y[expert == 2].isnan().all())
    assert not bool(y[token == 7].isfinite().any())


@every_impl
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [False, True])
def test_combine_matches_fp64(impl, dtype, weighted):
    for tokens, width in ((0, 5), (1, 1), (40, 37)):
        rows = dispatch_plan(routing("skipped slots", tokens, 3, EXPERTS), EXPERTS)[1]
        y = seeded(tokens * 3, width, dtype=dtype).requires_grad_()
        weights = seeded(tokens, 3, dtype=dtype, seed=1).requires_grad_() if weighted else None
        out = combine(y, rows, weights, impl=impl)
        upcast = [value.detach().double().requires_grad_() for value in ([y] if weights is None else [y, weights])]
        terms = torch.cat([upcast[0], upcast[0].new_zeros(1, width)])[rows]  # -1 is the row of zeros
        exact = (terms * (upcast[1][..., None] if weighted else 1)).sum(1)
        assert out.dtype == dtype
        assert error(out.detach(), exact.detach()) <= TOLERANCE[dtype]
        grad = seeded(tokens, width, dtype=dtype, seed=2)
        leaves = [y] if weights is None else [y, weights]
        for got, wanted in zip(gradients_of(out, leaves, grad), gradients_of(exact, upcast, grad.double())):
            assert got.dtype == dtype
            assert error(got, wanted) <= TOLERANCE[dtype]


@every_impl
def test_combine_of_a_token_keeps_its_bits(impl):
    y, rows = seeded(200, 45, dtype=torch.float32), torch.randperm(200)[:120].view(40, 3)
    rows[5] = -1
    weights = seeded(40, 3, dtype=torch.float32, seed=1)
    for scale in (None, weights):
        whole = combine(y, rows, scale, impl=impl)
        assert not whole[5].any()
        for n in (1, 2):
            with threads(n):
                chosen = torch.randperm(40)[:13]
                assert torch.equal(combine(y, rows[chosen], None if scale is None else scale[chosen], impl=impl),
                                   whole[chosen])  # fmt: skip
    ascending = (y[rows[0, 0]] + y[rows[0, 1]]) + y[rows[0, 2]]
    assert torch.equal(combine(y, rows[:1], impl=impl)[0], ascending)


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
    if has_native("grouped_linear"):
        order, rows, offsets, tiles = plan
        for bad in ((order + 20, rows, offsets), (order, rows + 20, offsets), (order, rows, offsets * 3)):
            with pytest.raises(RuntimeError, match="point outside of its 12 rows"):
                grouped_linear(x, weight, bias, (*bad, tiles), gather=True)
        with pytest.raises(IndexError, match="rows must be >= -1 and < 6, got 6"):
            combine(x, torch.full((1, 1), 6))


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


# The Triton launchers: their tiles, splits and limits.
launch_dispatch_plan = torch.ops.toolkit.dispatch_plan
launch_grouped_linear = torch.ops.toolkit.grouped_linear
grouped_linear_backward = torch.ops.toolkit.grouped_linear_backward
launch_combine = torch.ops.toolkit.combine
combine_backward = torch.ops.toolkit.combine_backward


# Sums of some tens of terms, and of a gradient's rows, rounded to 16 bits before they are added.
NEAR = {torch.float32: 4 * TOLERANCE_of_triton[torch.float32], torch.float16: 2 * TOLERANCE_of_triton[torch.float16]}


EXPERTS_of_triton = 3


def product(tokens, slots, inner, outputs, gather, transposed, dtype=torch.float32, tile=16):
    """x, weight, bias, grad and plan."""
    plan = launch_dispatch_plan(routing_of_triton(tokens, slots, EXPERTS_of_triton), EXPERTS_of_triton, tile)
    x = normal(tokens if gather else tokens * slots, inner, dtype=dtype)
    weight = normal(EXPERTS_of_triton, outputs, inner, dtype=dtype, scale=inner**-0.5, seed=1)
    weight = weight.mT.contiguous() if transposed else weight
    bias, grad = (
        normal(EXPERTS_of_triton, outputs, dtype=dtype, seed=2),
        normal(tokens * slots, outputs, dtype=dtype, seed=3),
    )
    return x, weight, bias, grad, plan


def oracle_of_triton(x, weight, bias, plan, gather, transposed):
    """A row at a time."""
    order, rows, offsets, _ = plan
    out = [x.new_zeros(weight.shape[2 if transposed else 1])] * len(order)
    for expert in range(EXPERTS_of_triton):
        matrix = weight[expert].mT if transposed else weight[expert]
        for row in range(int(offsets[expert]), int(offsets[expert + 1])):
            out[row] = matrix @ x[int(order[row]) // rows.shape[1] if gather else row] + bias[expert]
    return torch.stack(out) if out else x.new_zeros(0, weight.shape[2 if transposed else 1])


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gather", "transposed"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("tokens", "slots", "inner", "outputs"), [(11, 2, 33, 40), (3, 1, 32, 17), (1, 3, 1, 1)])
def test_outputs_and_gradients_match_fp64(dtype, gather, transposed, tokens, slots, inner, outputs):
    x, weight, bias, grad, plan = product(tokens, slots, inner, outputs, gather, transposed, dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = oracle_of_triton(*leaves, plan, gather, transposed)
    y = launch_grouped_linear(x, weight, bias, *plan, gather, transposed)
    close(y, exact.detach(), NEAR[dtype])
    assert int(torch.count_nonzero(y[int(plan[2][-1]) :])) == 0
    if exact.requires_grad:
        wanted = torch.autograd.grad(exact, leaves, grad.double())
        got = grouped_linear_backward(grad, x, weight, *plan, gather, transposed, True, True, True)
        for value, one, like in zip(got, wanted, (x, weight, bias), strict=True):
            assert value.dtype == like.dtype
            close(value, one, NEAR[dtype])
        assert int(torch.count_nonzero(got[1][1])) == int(torch.count_nonzero(got[2][1])) == 0


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_batch_invariant_for_every_tile_of_the_plan(transposed):
    tokens, slots = 20, 2
    x, weight, bias, _, _ = product(tokens, slots, 40, 20, True, transposed)
    ids = routing_of_triton(tokens, slots, EXPERTS_of_triton)

    def by_slot(some, tile=16):
        plan = launch_dispatch_plan(ids[some], EXPERTS_of_triton, tile)
        y = launch_grouped_linear(x[some], weight, bias, *plan, True, transposed)
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


@only_triton
@pytest.mark.usefixtures("impl")
def test_layouts_of_memory_and_only_what_is_needed():
    x, weight, bias, grad, plan = product(7, 2, 20, 16, True, False)
    y = launch_grouped_linear(x, weight, bias, *plan, True, False)
    whole = grouped_linear_backward(grad, x, weight, *plan, True, False, True, True, True)
    turned = weight.mT.contiguous().mT
    assert torch.equal(
        launch_grouped_linear(x, weight[:, :, None].expand(-1, -1, 2, -1)[:, :, 1], bias, *plan, True, False), y
    )
    close(launch_grouped_linear(x.T.contiguous().T, turned, bias, *plan, True, False), y, 1e-6)
    strided = torch.stack([weight, weight], -1)[..., 0]
    assert torch.equal(launch_grouped_linear(x, strided, bias, *plan, True, False), y)
    for at in range(3):
        needs = [index == at for index in range(3)]
        for index, value in enumerate(grouped_linear_backward(grad, x, weight, *plan, True, False, *needs)):
            assert torch.equal(value, whole[index]) if index == at else value.numel() == 0


@only_triton
@pytest.mark.usefixtures("impl")
def test_nothing_to_do_and_bad_input():
    for tokens, experts in ((0, 3), (4, 0)):
        plan = launch_dispatch_plan(torch.zeros(tokens, 2, dtype=torch.int64), experts, 16)
        x, weight = normal(tokens, 8), normal(experts, 5, 8)
        y = launch_grouped_linear(x, weight, None, *plan, True, False)
        assert torch.equal(y, torch.zeros(2 * tokens, 5))
        got = grouped_linear_backward(y, x, weight, *plan, True, False, True, True, True)
        assert [int(torch.count_nonzero(t)) for t in got] == [0, 0, 0]
        assert [t.shape for t in got] == [x.shape, weight.shape, (experts, 5)]
    x, weight, _, _, plan = product(4, 2, 8, 5, True, False)
    with pytest.raises(ToolkitError, match=r"kernels of grouped_linear, got torch\.float64"):
        launch_grouped_linear(x.double(), weight.double(), None, *plan, True, False)
    with pytest.raises(ToolkitError, match="got bfloat16 for grouped_linear"):
        launch_grouped_linear(x.bfloat16(), weight.bfloat16(), None, *plan, True, False)


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "slots", "width"), [(7, 3, 33), (1, 1, 1), (0, 2, 4), (2, 2, 2100)])
@pytest.mark.parametrize("scored", [None, torch.float32, torch.float16])
def test_combine_has_the_specification_s_bits_and_fp64_s_gradients(dtype, tokens, slots, width, scored):
    rows = launch_dispatch_plan(routing_of_triton(tokens, slots, EXPERTS_of_triton), EXPERTS_of_triton, 16)[1]
    y, grad = normal(tokens * slots, width, dtype=dtype), normal(tokens, width, dtype=dtype, seed=1)
    weights = None if scored is None else normal(tokens, slots, dtype=scored, seed=2)
    out = launch_combine(y, rows, weights)
    assert torch.equal(out, reference.combine(y, rows, weights))
    strange = y.clone()
    unused = torch.ones(len(y), dtype=torch.bool)
    unused[rows[rows >= 0]] = False
    strange[unused] = torch.nan
    skipped = None if weights is None else torch.where(rows >= 0, weights, torch.nan)
    assert torch.equal(launch_combine(strange, rows, skipped), out)
    leaf, factor = y.double().requires_grad_(), torch.ones(rows.shape) if weights is None else weights
    factor = factor.double().requires_grad_()
    picked = torch.where(rows[..., None] >= 0, leaf[rows.clamp_min(0)] if len(y) else leaf.view(0, slots, width), 0.0)
    exact = torch.autograd.grad((picked * factor[..., None]).sum(1), [leaf, factor], grad.double())
    to_y, to_weights = combine_backward(grad, y, rows, weights, True, weights is not None)
    close(to_y, exact[0], TOLERANCE_of_triton[dtype])
    if weights is None:
        assert to_weights.numel() == 0
    else:
        assert to_weights.dtype == scored
        close(to_weights, exact[1], TOLERANCE_of_triton[scored])
        assert torch.equal(combine_backward(grad, y, rows, weights, False, True)[1], to_weights)
