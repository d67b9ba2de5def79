"""lora_add and lora_linear: against fp64 row by row, forward and every gradient, and their limits."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    SMALL,
    impl_and_dtype,
    impl_dtype_and,
    implementations,
    only_triton,
)
from tests.helpers.interpreter import far_apart
from tests.helpers.lora import Batch, evaluate, make_batch, oracle
from toolkit.errors import ToolkitError
from toolkit.ops.linear import linear
from toolkit.ops.lora_linear import lora_add, lora_linear, tiles

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# rows, K, N, ranks; slices of each adapter; which are DoRA; whether the layer has a bias.
CASES = {
    "no rows": ((0, 5, 4, (3, 2)), None, None, True),
    "one of everything": ((1, 1, 1, (1,)), None, (True,), True),
    "ranks": ((40, 60, 17, (1, 8, 3, 16, 5)), None, None, False),
    "long": ((40, 330, 70, (4, 64)), None, (True, False), True),
    "slices": ((60, 33, 21, (3, 7, 2)), (4, 0, 3), None, False),
    "slices and scales": ((60, 20, 33, (2, 9)), (3, 0), (True, True), False),
}
FAST = ["ranks", "slices and scales"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """In the interpreter: several splits and blocks of rows at small sizes."""
    if SMALL:
        monkeypatch.setattr(tiles, "SPLIT", 64)
        monkeypatch.setattr(tiles, "SUMMED_ROWS", 32)


def batch_of(name: str, dtype: torch.dtype, seed: int = 0) -> Batch:
    sizes, slices, scaled, bias = CASES[name]
    return make_batch(*sizes, dtype, slices=slices, scaled=scaled, bias=bias, seed=seed)


def gradient(batch: Batch) -> torch.Tensor:
    return torch.randn(batch.base.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(batch.base)


def mixed(dtype: torch.dtype = torch.float32, rows: int = 24) -> Batch:
    return make_batch(rows, 60, 18, (6, 3, 10), dtype, scaled=(False, True, False))


@impl_dtype_and("case", list(CASES), FAST)
def test_outputs_and_every_gradient_match_fp64(impl, dtype, case):
    batch = batch_of(case, dtype)
    grad = gradient(batch)
    got, again = (evaluate(Batch.__call__, batch, grad) for _ in range(2))
    expected = evaluate(oracle, batch.mapped(torch.Tensor.double), grad.double())
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.dtype == dtype
        assert torch.equal(value, again[name])
        exact = expected[name]
        # A few roundings of the largest value, and the float32 sums of up to 330 x 64 products.
        size = float(exact.abs().max()) if exact.numel() else 0.0
        bound = 1e-12 * (size + 1) if dtype == torch.float64 else max(2 * EPS[dtype], 16 * EPS[torch.float32]) * size
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_the_reference_by_name_is_differentiated_by_torch():
    batch = batch_of("slices and scales", torch.float64)
    named = evaluate(Batch.__call__, replace(batch, impl="reference"), gradient(batch))
    for name, value in evaluate(Batch.__call__, batch, gradient(batch)).items():
        torch.testing.assert_close(named[name], value, rtol=1e-12, atol=1e-12)


@implementations(REFERENCE, NATIVE)
@pytest.mark.parametrize("case", ["ranks", "slices and scales", "one of everything"])
def test_gradients_are_those_of_finite_differences(impl, case):
    batch = batch_of(case, torch.float64).rows(torch.arange(min(8, CASES[case][0][0])))
    leaves = batch.leaves()

    def call(*tensors):
        replaced = iter(tensors)
        return batch.mapped(lambda _: next(replaced))()

    # ``mapped`` and ``leaves`` go by different orders.
    order = []
    batch.mapped(lambda t: order.append(t) or t)
    assert {id(t) for t in order} >= {id(t) for t in leaves.values()}
    assert torch.autograd.gradcheck(call, [t.clone().requires_grad_() for t in order])


@impl_and_dtype()
@pytest.mark.parametrize("scaled", [None, (True, True, False)], ids=str)
def test_a_row_without_adapter_has_the_bits_of_its_base(impl, dtype, scaled):
    batch = make_batch(40, 60, 33, (8, 4, 2), dtype, scaled=scaled)
    batch.base[3] = -0.0
    batch.adapters[3] = -1
    y, plain, bits = batch(), batch.adapters < 0, INTEGERS[dtype.itemsize]
    assert torch.equal(y[plain].view(bits), batch.base[plain].view(bits))
    assert not torch.equal(y[~plain], batch.base[~plain])
    alone = replace(batch, adapters=torch.full_like(batch.adapters, -1))()
    assert torch.equal(alone.view(bits), batch.base.view(bits))
    assert alone.data_ptr() != batch.base.data_ptr()


def test_linear_is_the_base(impl):
    batch = mixed()
    weight, bias = torch.randn(18, 60), torch.randn(18)
    scales = batch.column_scales
    got = lora_linear(
        batch.x, weight, bias, batch.a, batch.b, batch.scaling, batch.adapters, column_scales=scales
    )  # fmt: skip
    base = linear(batch.x, weight, bias)
    assert torch.equal(got, replace(batch, base=base, bias=bias)())
    assert torch.equal(got[batch.adapters < 0], base[batch.adapters < 0])


def test_fast_takes_the_mkl_gemm():
    batch = mixed()
    weight = torch.randn(18, 60)
    expected = replace(batch, base=torch.nn.functional.linear(batch.x, weight), column_scales=None)()
    got = lora_linear(batch.x, weight, None, batch.a, batch.b, batch.scaling, batch.adapters, fast=True)
    assert torch.equal(got, expected)


def test_strides_and_leading_dimensions(impl):
    batch = make_batch(24, 60, 18, (6, 3, 10), slices=(2, 0, 3), scaled=(False, True, False))
    flat = batch()
    shaped = replace(batch, base=batch.base.view(2, 12, 18), x=batch.x.view(2, 12, 60))
    shaped = replace(shaped, adapters=batch.adapters.view(2, 12), groups=batch.groups.view(2, 12))
    assert torch.equal(shaped(), flat.view(2, 12, 18))
    one = replace(batch, base=batch.base[5], x=batch.x[5], adapters=batch.adapters[5], groups=batch.groups[5])
    assert torch.equal(one(), flat[5])
    cut = replace(batch, base=torch.cat([batch.base] * 2, 1)[:, 18:], x=torch.cat([batch.x] * 2, 1)[:, 60:])
    turned = replace(cut, a=[t.mT.contiguous().mT for t in batch.a], b=[t.mT.contiguous().mT for t in batch.b])
    parted = replace(cut, a=[torch.cat([t, t], -1)[..., :60] for t in batch.a],
                     b=[t.repeat_interleave(2, -1)[..., ::2] for t in batch.b])  # fmt: skip
    grad = gradient(batch)
    plain = evaluate(Batch.__call__, batch, grad)
    for strided in (cut, turned, parted):
        found = evaluate(Batch.__call__, strided, torch.cat([grad, grad], 1)[:, 18:])
        assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_nan_and_infinity_stay_in_their_row_and_adapter(impl):
    batch = mixed(rows=30)
    clean = evaluate(Batch.__call__, batch, gradient(batch))
    dirty = replace(batch, a=[batch.a[0], torch.full_like(batch.a[1], torch.nan), batch.a[2]], x=batch.x.clone())
    row = int((batch.adapters == 0).nonzero()[0])
    dirty.x[row] = float("inf")
    found = evaluate(Batch.__call__, dirty, gradient(batch))
    others = (batch.adapters != 1) & (torch.arange(30) != row)
    assert torch.equal(found["y"][others], clean["y"][others])
    assert torch.equal(found["x"][batch.adapters != 1], clean["x"][batch.adapters != 1])
    assert bool(found["y"][batch.adapters == 1].isnan().all())
    assert torch.equal(found["a2"], clean["a2"])
    assert torch.equal(found["b2"], clean["b2"])


def test_only_the_gradients_asked_for_and_adapters_that_nobody_uses(impl):
    batch = mixed(rows=9)
    batch = replace(batch, adapters=torch.tensor([2, -1, 2, 2, -1, 2, 1, 1, 2]), column_scales=[batch.bias + 2] * 3)
    names = list(batch.leaves())
    for wanted in [{name} for name in names] + [set(names), {"a2", "x"}, {"b2", "c1"}, {"bias", "a0"}]:
        leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in batch.leaves().items()}
        fresh = replace(
            batch, base=leaves["base"], x=leaves["x"], bias=leaves["bias"],
            a=[leaves[f"a{i}"] for i in range(3)], b=[leaves[f"b{i}"] for i in range(3)],
            column_scales=[leaves[f"c{i}"] for i in range(3)],
        )  # fmt: skip
        fresh().square().sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == wanted
        for name in wanted:
            assert (int(leaves[name].grad.count_nonzero()) == 0) == (name in ("a0", "b0", "c0"))


def test_no_rows_no_adapters_no_inner_size(impl):
    batch = mixed(rows=4)
    none = replace(batch, a=[], b=[], scaling=[], column_scales=None, adapters=torch.full((4,), -1))
    found = evaluate(Batch.__call__, none, gradient(batch))
    assert torch.equal(found["y"], batch.base)
    assert torch.equal(found["base"], gradient(batch))
    assert int(found["x"].count_nonzero()) == 0
    used = replace(batch, adapters=torch.zeros(4, dtype=torch.int64), column_scales=None)
    empty = replace(used, x=batch.x[:, :0], a=[one[:, :0] for one in batch.a])
    assert torch.equal(empty(), batch.base)
    assert evaluate(Batch.__call__, empty, gradient(batch))["a0"].shape == (6, 0)
    unranked = replace(used, a=[one[:0] for one in batch.a], b=[one[:, :0] for one in batch.b])
    assert torch.equal(unranked(), batch.base)
    assert evaluate(Batch.__call__, unranked, gradient(batch))["b0"].shape == (18, 0)


def test_wrong_arguments_are_one_sentence():
    batch = make_batch(4, 20, 7, (4, 2, 3), slices=(0, 2, 0), scaled=(True, False, False))
    a, b, ids = batch.a, batch.b, batch.adapters
    for changes, words in [
        ({"a": torch.zeros(3, 4, 20)}, r"a must be a list of tensors, .* got a tensor of shape \[3, 4, 20\]"),
        ({"scaling": torch.ones(3)}, "scaling must be a list of numbers"),
        ({"scaling": [1.0]}, "scaling must have 3 entries, one of each adapter in a, got 1"),
        ({"b": b[:2]}, "b must have 3 entries"),
        ({"a": [a[0][:, :5], *a[1:]]}, r"a\[0\] must have shape \[R, 20\] or \[G, R, 20\], got \[4, 5\]"),
        ({"b": [b[0], b[1][:1], b[2]]}, r"b\[1\] must have shape \[2, 7, 2\] .* got \[1, 7, 2\]"),
        ({"adapters": ids[:2]}, r"adapters must be int64 \[4\] .* got torch.int64 of shape \[2\]"),
        ({"adapters": ids.int()}, "adapters must be int64 .* got torch.int32"),
        ({"groups": ids.int()}, "groups must be int64 .* got torch.int32"),
        ({"base": batch.base[:2]}, r"base must have as many rows as x .* got \[2, 7\]"),
        ({"bias": batch.bias[:3]}, r"bias must have shape \[7\], got \[3\]"),
        ({"column_scales": [batch.bias[:3], None, None]}, r"column_scales\[0\] must have shape \[7\], got \[3\]"),
        ({"column_scales": [batch.bias.half(), None, None]}, r"column_scales\[0\] must have the dtype of base"),
        ({"a": [a[0], a[1].half(), a[2]]}, r"a\[1\] must have the dtype of base, torch.float32, got torch.float16"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            replace(batch, **changes)()


@implementations(REFERENCE, NATIVE)
def test_adapters_and_slices_that_do_not_exist(impl):
    batch = make_batch(4, 20, 7, (4, 2, 3), slices=(0, 2, 0))
    with pytest.raises(IndexError, match=r"adapters must be negative or 0 to 2, got 3"):
        replace(batch, adapters=torch.tensor([0, -1, 3, 1]))()
    for groups, words in (([0, 2, 0, 0], "0 to 1 for adapter 1, got 2"), ([0, 0, -1, 0], "0 to 0 for adapter 2, got")):
        with pytest.raises(IndexError, match=f"groups must be {words}"):
            replace(batch, adapters=torch.tensor([0, 1, 2, -1]), groups=torch.tensor(groups))()
    # The slice of a row without adapter is not read.
    replace(batch, adapters=torch.full((4,), -1), groups=torch.full((4,), 99))()
    with pytest.raises(IndexError, match="adapters must be negative where there are no adapters, got 0"):
        replace(batch, a=[], b=[], scaling=[], adapters=torch.zeros(4, dtype=torch.int64))()


def test_registration_is_sound():
    batch = make_batch(5, 6, 4, (3, 2), slices=(0, 2), scaled=(True, False))
    for needs in (False, True):
        one = batch.mapped(lambda t, needs=needs: t.detach().requires_grad_(needs))
        scales = [one.column_scales[0], one.base.new_empty(0)]
        plan = [one.scaling, one.adapters, one.groups]
        forward = torch.ops.toolkit.lora_add_rows.default
        torch.library.opcheck(forward, [one.base, one.x, one.a, one.b, *plan, scales, one.bias])
        torch.library.opcheck(forward, [one.base, one.x, one.a, one.b, *plan[:2], None, [], None])
    needed = [True, True, [True, False], [False, True], [True, False], True]
    arguments = [batch.base, batch.base, batch.x, batch.a, batch.b, *plan, [t.detach() for t in scales], batch.bias]
    torch.library.opcheck(torch.ops.toolkit.lora_add_rows_backward.default, [*arguments, *needed])


def test_compiles_into_one_graph():
    batch = mixed()
    compiled = torch.compile(lambda b: evaluate_sum(b), fullgraph=True, backend="aot_eager")
    for one in (batch, replace(batch, column_scales=None)):
        graded = [one.mapped(lambda t: t.detach().clone().requires_grad_()) for _ in range(2)]
        sums = compiled(graded[0]), evaluate_sum(graded[1])
        assert torch.equal(*sums)
        for total in sums:
            total.backward()
        for name, leaf in graded[0].leaves().items():
            assert torch.equal(leaf.grad, graded[1].leaves()[name].grad)


def evaluate_sum(batch: Batch) -> torch.Tensor:
    return lora_add(
        batch.base, batch.x, batch.a, batch.b, batch.scaling, batch.adapters,
        column_scales=batch.column_scales, bias=batch.bias,
    ).square().sum()  # fmt: skip


# The Triton launcher: its limits.
@only_triton
@pytest.mark.usefixtures("impl")
def test_adapters_that_do_not_exist_give_nan():
    """A kernel raises nothing."""
    batch = make_batch(20, 40, 17, (8, 2, 3), slices=(0, 2, 0))
    clean = batch()
    batch.adapters[:2] = torch.tensor([7, 1])
    batch.groups[1] = 2
    y = batch()
    assert bool(y[:2].isnan().all())
    assert torch.equal(y[2:], clean[2:])


@only_triton
@pytest.mark.usefixtures("impl")
def test_rows_beyond_two_to_the_31_elements_and_a_dtype_that_is_named():
    batch = make_batch(3, 20, 7, (4, 2), torch.float16)
    far = replace(batch, x=far_apart(batch.x))
    grad = gradient(batch)
    assert torch.equal(far(), batch())
    backward = torch.ops.toolkit.lora_add_rows_backward
    need = [False, True, [True] * 2, [True] * 2, [], False]
    found = [
        backward(grad, None, x, batch.a, batch.b, batch.scaling, batch.adapters, None, [], None, *need)
        for x in (batch.x, far.x)
    ]
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(*pair) for at in (2, 3) for pair in zip(found[0][at], found[1][at], strict=True))
    with pytest.raises(ToolkitError, match="float64"):
        batch.mapped(torch.Tensor.double)()


@only_triton
@pytest.mark.usefixtures("impl")
def test_a_step_with_the_adapters_of_an_earlier_one_makes_no_table(monkeypatch):
    from toolkit.ops.lora_linear import triton_table

    made = []
    build = triton_table._build
    monkeypatch.setattr(triton_table, "_build", lambda *arguments: made.append(1) or build(*arguments))
    batch = make_batch(6, 32, 16, (4, 2), scaled=(True, False))
    first = batch()
    batch.a[0].mul_(2.0)  # written in place, as by an optimizer
    second = replace(batch, x=batch.x.clone(), adapters=batch.adapters.flip(0))()
    assert made == [1]
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, oracle(replace(batch, adapters=batch.adapters.flip(0))), rtol=0, atol=1e-4)
    replace(batch, scaling=[3.0, 4.0])()
    assert made == [1, 1]
