"""lora_linear: against fp64 row by row, its gradients, and that a row's bits depend on it and its adapter alone."""

import random

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    impl_and_dtype,
    impl_dtype_and,
    implementations,
    only_triton,
)
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import THREADS, threads
from toolkit.errors import ToolkitError
from toolkit.ops.linear import linear
from toolkit.ops.lora_linear import lora_add, lora_linear, tiles
from toolkit.ops.registry import has_native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
SHAPES = [(0, 5, 4, 3, 2), (1, 1, 1, 1, 1), (7, 60, 17, 8, 3), (40, 33, 70, 5, 4), (40, 330, 20, 16, 2)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """In the interpreter: several splits and blocks of rows at small sizes."""
    if SMALL:
        monkeypatch.setattr(tiles, "SPLIT", 64)
        monkeypatch.setattr(tiles, "SUMMED_ROWS", 32)


def make(rows, inner, outputs, rank, count, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x, weight, bias, a, b, scaling, adapters."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, inner), (outputs, inner), (outputs,), (count, rank, inner), (count, outputs, rank))
    tensors = [torch.randn(size, generator=g).to(dtype) for size in sizes]
    scaling = torch.rand(count, generator=g) + 0.5
    return [*tensors, scaling, torch.randint(-1, count, (rows,), generator=g)]


def oracle(x, weight, bias, a, b, scaling, adapters):
    """Row by row, in float64."""
    rows = [x[:0] @ weight.T]
    for t, index in enumerate(adapters.tolist()):
        y = weight @ x[t] + (0 if bias is None else bias)
        rows.append((y if index < 0 else y + scaling[index] * (b[index] @ (a[index] @ x[t])))[None])
    return torch.cat(rows)


def with_gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:5]]
    y = function(*leaves, *inputs[5:])
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves))]


@impl_and_dtype()
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_every_gradient_match_fp64(impl, dtype, shape):
    if SMALL and impl is TRITON:
        shape = (shape[0], min(shape[1], 150), *shape[2:])  # three splits
    inputs = make(*shape, dtype)
    grad = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    upcast = [t.double() if t.is_floating_point() else t for t in inputs]

    def call(*tensors):
        return lora_linear(*tensors, impl=impl.option)

    got, again = (with_gradients(call, inputs, grad) for _ in range(2))
    expected = with_gradients(oracle, upcast, grad.double())
    for value, repeat, exact in zip(got, again, expected):
        assert value.dtype == dtype
        assert torch.equal(value, repeat)
        # A few roundings of the largest value, and the float32 sums of up to 530 x 16 products.
        size = float(exact.abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=max(4 * EPS[dtype], 16 * EPS[torch.float32])
                                   * size if dtype != torch.float64 else 1e-12 * (size + 1))  # fmt: skip


@impl_and_dtype()
def test_a_row_without_adapter_has_the_bits_of_linear(impl, dtype):
    inputs = make(40, 60, 33, 8, 3, dtype)
    x, weight, bias, a, b, scaling, adapters = inputs
    x[3] = -0.0
    bias = bias.fill_(-0.0)
    adapters[3] = -1
    base = linear(x, weight, bias, impl=impl.option)
    y = lora_linear(x, weight, bias, a, b, scaling, adapters, impl=impl.option)
    plain = adapters < 0
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(y[plain].view(integers), base[plain].view(integers))
    assert not torch.equal(y[~plain], base[~plain])
    alone = lora_linear(x, weight, bias, a, b, scaling, torch.full_like(adapters, -1), impl=impl.option)
    assert torch.equal(alone.view(integers), base.view(integers))


@impl_dtype_and("size", [(60, 17, 8), (530, 40, 5)], [(530, 40, 5)], [torch.float32, torch.bfloat16])
def test_bits_of_a_row_for_any_adapters_of_other_rows(impl, dtype, size):
    rng = random.Random(0)
    few = SMALL and impl is TRITON
    rows = 40 if few else 150
    size = (min(size[0], 150), *size[1:]) if few else size
    x, weight, bias, a, b, scaling, adapters = make(rows, *size, 4, dtype)
    grad = torch.randn(rows, size[1], generator=torch.Generator().manual_seed(2)).to(dtype)

    def call(chosen, ids):
        return lora_linear(x[chosen], weight, bias, a, b, scaling, ids, impl=impl.option)

    def gradient(chosen):
        return torch.ops.toolkit.lora_add_backward(
            grad[chosen], x[chosen], a, b, scaling, adapters[chosen], True, False, False
        )[0]

    everything = torch.arange(rows)
    whole, whole_gradient = call(everything, adapters), gradient(everything)
    for trial in range(3 if few else 12):
        with threads(THREADS[trial % len(THREADS)]):
            chosen = torch.randperm(rows)[: rng.choice([1, 2, 5, 33, 64, 150])]
            assert torch.equal(call(chosen, adapters[chosen]), whole[chosen])
            if impl.name != "reference":  # the order of its sums is torch's
                assert torch.equal(gradient(chosen), whole_gradient[chosen])
            others = torch.randint(-1, 4, (rows,))
            keep = torch.rand(rows) < 0.3
            assert torch.equal(call(everything, torch.where(keep, adapters, others))[keep], whole[keep])


@pytest.mark.skipif(not has_native("lora_add"), reason="the order of sums is a promise of the native kernel")
def test_gradients_have_the_same_bits_on_every_run_and_any_threads():
    inputs = make(600, 300, 70, 8, 2)
    grad = torch.randn(600, 70)

    def gradients(n):
        with threads(n):
            leaves = [t.clone().requires_grad_() for t in inputs[:5]]
            base = torch.zeros(600, 70)
            y = lora_add(base, leaves[0], leaves[3], leaves[4], *inputs[5:])
            return torch.autograd.grad(y, [leaves[0], leaves[3], leaves[4]], grad)

    first = gradients(1)
    for n in (1, 2, 2):
        assert all(torch.equal(*pair) for pair in zip(first, gradients(n)))
    # A gradient row of x depends on its own row.
    leaf = inputs[0][17:19].clone().requires_grad_()
    lora_add(torch.zeros(2, 70), leaf, *inputs[3:6], inputs[6][17:19]).backward(grad[17:19])
    assert torch.equal(leaf.grad, first[0][17:19])


def test_ranks_are_padded_with_zeros(impl):
    x, weight, bias, a, b, scaling, adapters = make(20, 60, 17, 8, 2)
    a[1, 3:] = 0
    b[1, :, 3:] = 0
    padded = lora_linear(x, weight, bias, a, b, scaling, torch.ones_like(adapters), impl=impl.option)
    narrow = lora_linear(
        x, weight, bias, a[1:, :3], b[1:, :, :3], scaling[1:], torch.zeros_like(adapters), impl=impl.option
    )  # fmt: skip
    torch.testing.assert_close(padded, narrow, rtol=1e-6, atol=1e-5)


def test_strides_and_leading_dimensions(impl):
    x, weight, bias, a, b, scaling, adapters = make(24, 60, 18, 6, 3)
    flat = lora_linear(x, weight, bias, a, b, scaling, adapters, impl=impl.option)
    cube = lora_linear(x.view(2, 12, 60), weight, bias, a, b, scaling, adapters.view(2, 12), impl=impl.option)
    assert torch.equal(cube, flat.view(2, 12, 18))
    assert torch.equal(lora_linear(x[5], weight, bias, a, b, scaling, adapters[5], impl=impl.option), flat[5])
    joined = torch.cat([x, x], 1)
    strided_a, strided_b = a.mT.contiguous().mT, b.transpose(0, 1).contiguous().transpose(0, 1)
    strided = lora_linear(
        joined[::2, 60:], weight, bias, strided_a, strided_b, scaling, adapters[::2], impl=impl.option
    )
    assert torch.equal(strided, flat[::2])
    grads = []
    for first, second in ((a, b), (strided_a, strided_b)):
        leaves = [first.detach().requires_grad_(), second.detach().requires_grad_()]
        lora_linear(x, weight, bias, *leaves, scaling, adapters, impl=impl.option).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(*pair) for pair in zip(*grads))


def test_nan_and_infinity_stay_in_their_row_and_adapter(impl):
    x, weight, bias, a, b, scaling, adapters = make(30, 60, 17, 8, 3)
    clean = lora_linear(x, weight, bias, a, b, scaling, adapters, impl=impl.option)
    a[1] = float("nan")
    dirty_x = x.clone()
    dirty_x[4] = float("inf")
    y = lora_linear(dirty_x, weight, bias, a, b, scaling, adapters, impl=impl.option)
    others = (adapters != 1) & (torch.arange(30) != 4)
    assert torch.equal(y[others], clean[others])
    assert bool(y[adapters == 1].isnan().all())


def test_only_the_gradients_asked_for_and_adapters_that_nobody_uses(impl):
    x, weight, bias, a, b, scaling, _ = make(9, 20, 7, 4, 3)
    adapters = torch.tensor([2, -1, 2, 2, -1, 2, 2, 2, 2])
    for wanted in (1, 2, 4, 8, 16, 25, 31) if SMALL and impl is TRITON else range(1, 32):
        leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate((x, weight, bias, a, b))]
        lora_linear(*leaves, scaling, adapters, impl=impl.option).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [bool(wanted >> i & 1) for i in range(5)]
        for leaf in leaves[3:]:
            assert leaf.grad is None or (bool((leaf.grad[:2] == 0).all()) and bool((leaf.grad[2] != 0).any()))


def test_no_rows_no_adapters_no_inner_size(impl):
    x, weight, bias, a, b, scaling, _ = make(4, 20, 7, 4, 3)
    none = torch.full((4,), -1)
    assert torch.equal(
        lora_linear(x, weight, bias, a[:0], b[:0], scaling[:0], none, impl=impl.option),
        linear(x, weight, bias, impl=impl.option),
    )
    ids = torch.zeros(4, dtype=torch.int64)
    empty = lora_linear(x[:, :0], weight[:, :0], bias, a[:, :, :0], b, scaling, ids, impl=impl.option)
    assert torch.equal(empty, bias.expand(4, 7))
    assert torch.equal(
        lora_linear(x, weight, bias, a[:, :0], b[:, :, :0], scaling, ids, impl=impl.option),
        linear(x, weight, bias, impl=impl.option),
    )


def test_fast_takes_the_mkl_gemm():
    inputs = make(9, 60, 17, 8, 3)
    x, weight, bias, a, b, scaling, adapters = inputs
    expected = lora_add(torch.nn.functional.linear(x, weight, bias), x, a, b, scaling, adapters)
    assert torch.equal(lora_linear(*inputs, fast=True), expected)


def test_wrong_arguments_are_one_sentence():
    x, weight, bias, a, b, scaling, adapters = make(4, 20, 7, 4, 3)
    for arguments, words in [
        ((x, weight, bias, a[0], b, scaling, adapters), r"a must have shape .* got \[4, 20\]"),
        ((x, weight, bias, a, b[:2], scaling, adapters), r"b must have shape \[3, 7, 4\] .* got \[2, 7, 4\]"),
        ((x, weight, bias, a, b, scaling[:1], adapters), r"scaling must have shape \[3\] for 3 adapters, got \[1\]"),
        ((x, weight, bias, a, b, scaling.requires_grad_(), adapters), "scaling must not require a gradient"),
        (
            (x, weight, bias, a, b, scaling.detach(), adapters[:2]),
            r"adapters must be int64 \[4\] .* got torch.int64 of shape \[2\]",
        ),
        ((x, weight, bias, a, b, scaling.detach(), adapters.int()), "adapters must be int64 .* got torch.int32"),
        (
            (x, weight, bias, a, b, torch.ones(3, dtype=torch.int64), adapters),
            "scaling must have a floating-point dtype, got torch.int64",
        ),
        ((x, weight, bias, a.half(), b, scaling.detach(), adapters), "must be equal"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            lora_linear(*arguments)


@implementations(REFERENCE, NATIVE)
def test_adapters_that_do_not_exist(impl):
    x, weight, bias, a, b, scaling, _ = make(4, 20, 7, 4, 3)
    with pytest.raises(IndexError, match=r"adapters must be negative or 0 to 2, got 3"):
        lora_linear(x, weight, bias, a, b, scaling, torch.full((4,), 3), impl=impl.option)


def test_registration_is_sound():
    x, weight, _, a, b, scaling, adapters = make(5, 6, 4, 3, 2)
    for needs in (False, True):
        tensors = [t.requires_grad_(needs) for t in (x @ weight.detach().T, x, a, b)]
        torch.library.opcheck(torch.ops.toolkit.lora_add.default, [*(t.detach().requires_grad_(needs) for t in tensors),
                                                                   scaling, adapters])  # fmt: skip
    arguments = [t.detach() for t in (x @ weight.T, x, a, b)]
    torch.library.opcheck(
        torch.ops.toolkit.lora_add_backward.default, [*arguments, scaling, adapters, True, False, True]
    )


# The Triton launcher: its limits.
@only_triton
@pytest.mark.usefixtures("impl")
def test_adapters_that_do_not_exist_give_nan():
    """A kernel raises nothing."""
    x, weight, bias, a, b, scaling, adapters = make(20, 40, 17, 8, 3)
    clean = lora_linear(x, weight, bias, a, b, scaling, adapters)
    strange = adapters.clone()
    strange[0] = 7
    y = lora_linear(x, weight, bias, a, b, scaling, strange)
    assert bool(y[0].isnan().all())
    assert torch.equal(y[1:], clean[1:])


@only_triton
@pytest.mark.usefixtures("impl")
def test_rows_beyond_two_to_the_31_elements_and_a_dtype_that_is_named():
    x, _, _, a, b, scaling, adapters = make(3, 20, 7, 4, 2, torch.float16)
    base, grad = torch.randn(2, 3, 7).half()
    y = lora_add(base, x, a, b, scaling, adapters)
    assert torch.equal(lora_add(base, far_apart(x), a, b, scaling, adapters), y)
    backward = torch.ops.toolkit.lora_add_backward
    gradients = [backward(grad, rows, a, b, scaling, adapters, True, True, True) for rows in (x, far_apart(x))]
    assert all(torch.equal(*pair) for pair in zip(*gradients))
    with pytest.raises(ToolkitError, match="float64"):
        lora_add(*(t.double() for t in (base, x, a, b)), scaling, adapters)
