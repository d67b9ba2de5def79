"""linear_logprob against dense float64 softmax: values, every gradient, bits, memory."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.implementations import (
    IMPLEMENTATIONS,
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    impl_and,
    impl_and_dtype,
    parameter,
)
from tests.helpers.linear_logprob import BOUND, VARIANTS, call, oracle, problem, run, run_exactly
from tests.helpers.rowwise import check_rows, error, seeded
from toolkit.errors import ToolkitError
from toolkit.ops.linear import linear
from toolkit.ops.linear_logprob import linear_logprob, tiles
from toolkit.ops.token_logprob import token_logprob


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """In the interpreter: several splits and chunks at small sizes."""
    if SMALL:
        monkeypatch.setattr(tiles, "SPLIT", 32)
        monkeypatch.setattr(tiles, "CHUNK", 48)


SIZES = [(1, 1, 1), (7, 33, 60), (13, 64, 2049), (101, 16, 5001)]


@pytest.mark.parametrize(
    ("impl", "dtype", "size"),
    [
        parameter(one, dtype, size)
        for one in IMPLEMENTATIONS
        for dtype in one.dtypes
        if dtype.itemsize > 2
        for size in ([(1, 1, 1), (7, 33, 60)] if SMALL and one is TRITON else SIZES)
    ],
    indirect=["impl"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(impl, dtype, size, variant):
    rows, depth, vocabulary = size
    tensors, targets, options = problem(rows, depth, vocabulary, dtype, variant)
    outputs, gradients = run(lambda t: call(t, targets, impl, **options), tensors)
    wanted, expected = run_exactly(lambda t: oracle(t, targets, **options), tensors)
    for got, want in zip([*outputs, *gradients], [*wanted, *expected], strict=True):
        assert got.dtype == dtype
        assert error(got, want.detach()) < BOUND[dtype]


@impl_and_dtype([torch.bfloat16, torch.float16])
def test_narrow_types(impl, dtype):
    """Inputs of 16 bits: within the rounding of the logits; the statistics come in float32."""
    tensors, targets, options = problem(9, 40, 300, dtype, "bias")
    outputs, gradients = run(lambda t: call(t, targets, impl, **options), tensors)
    wanted, expected = run_exactly(lambda t: oracle(t, targets), tensors)
    for got, want in zip(outputs, wanted):
        assert got.dtype == torch.float32
        assert error(got, want) < BOUND[dtype]
    for got, want in zip(gradients, expected):
        assert got.dtype == dtype
        assert error(got, want) < BOUND[dtype]


@pytest.mark.parametrize("choices", [1, 3, 20])
def test_several_targets_a_row(impl, choices):
    tensors, targets, options = problem(6, 20, 100, variant="all", choices=choices)
    targets[0] = targets[0, 0].clamp_min(0)  # the same target several times
    outputs, gradients = run(lambda t: call(t, targets, impl, **options), tensors)
    wanted, expected = run_exactly(lambda t: oracle(t, targets, **options), tensors)
    assert outputs[0].shape == targets.shape
    assert max(map(error, [*outputs, *gradients], [*wanted, *expected])) < impl.near(1e-12)


@pytest.mark.parametrize("which", range(4))
def test_each_statistic_alone_passes_its_gradient(impl, which):
    tensors, targets, options = problem(9, 20, 70 if SMALL and impl is TRITON else 2100, variant="all")
    results = []
    for f, dtype in (
        (lambda t: call(t, targets, impl, **options), impl.dtypes[0]),
        (lambda t: oracle(t, targets, **options), torch.float64),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        results.append(torch.autograd.grad(f(leaves)[which].sum(), leaves))
    assert max(map(error, *results)) < impl.near(1e-12)


def test_only_the_gradients_asked_for(impl):
    for wanted in range(1, 8):
        tensors, targets, _ = problem(5, 7, 30, variant="bias")
        for i, x in enumerate(tensors):
            x.requires_grad_(bool(wanted >> i & 1))
        call(tensors, targets, impl).logprob.sum().backward()
        assert [x.grad is not None for x in tensors] == [bool(wanted >> i & 1) for i in range(3)]


@pytest.mark.parametrize("targets", [[4, -100, -100], [-100, -100, -100]])
def test_ignored_rows_have_zero_logprob_and_gradient(impl, targets):
    tensors, _, _ = problem(3, 8, 50, torch.float32)
    hidden, weight = (x.requires_grad_() for x in tensors)
    logprob = linear_logprob(hidden, weight, torch.tensor(targets), impl=impl.option).logprob
    assert logprob.tolist()[1:] == [0.0, 0.0]
    logprob.sum().backward()
    assert [bool(row.any()) for row in hidden.grad] == [target >= 0 for target in targets]
    assert bool(weight.grad.any()) == (targets[0] >= 0)
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 9)])
def test_nothing_to_sum(impl, shape):
    tensors, targets, _ = problem(*shape, dtype=torch.float32, variant="bias")
    outputs, gradients = run(lambda t: call(t, targets, impl), tensors)
    wanted, _ = run_exactly(lambda t: oracle(t, targets), tensors)
    assert max(map(error, outputs, wanted)) < 1e-6
    assert [x.shape for x in gradients] == [x.shape for x in tensors]
    if not shape[0]:
        assert not any(x.any() for x in gradients)


@impl_and_dtype([torch.float32, torch.bfloat16], [REFERENCE, NATIVE])
@pytest.mark.parametrize(("depth", "vocabulary"), [(33, 60), (64, 4100), (600, 2500)])
def test_bits_are_those_of_the_head_and_its_softmax(impl, depth, vocabulary, dtype):
    """What the engine computes for a token from logits, training computes without them."""
    tensors, targets, _ = problem(130, depth, vocabulary, dtype, "bias")
    fused = call(tensors, targets, impl)
    logprob, lse = token_logprob(linear(*tensors, impl=impl.option), targets, impl=impl.option)
    assert torch.equal(fused.logprob, logprob)
    assert torch.equal(fused.lse, lse)


@impl_and("variant, vocabulary", itertools.product(["bias", "all"], [60, 5001]), [("all", 5001)])
def test_rows_do_not_depend_on_other_rows(impl, variant, vocabulary):
    few = SMALL and impl is TRITON
    rows, vocabulary = (40, min(vocabulary, 70)) if few else (230, vocabulary)
    tensors, targets, options = problem(rows, 33, vocabulary, torch.float32, variant)
    temperature = options.pop("temperature", torch.ones(rows))

    def statistics(hidden, targets, temperature):
        return tuple(call([hidden, *tensors[1:]], targets, impl, temperature=temperature, top_k=5, **options))

    check_rows(statistics, [tensors[0], targets, temperature])


def test_gradients_are_the_same_from_run_to_run(impl):
    size = (40, 40, 70) if SMALL and impl is TRITON else (150, 40, 3000)
    tensors, targets, _ = problem(*size, torch.float32, "bias")
    leaves = [x.requires_grad_() for x in tensors]
    first = torch.autograd.grad(call(leaves, targets, impl).logprob.sum(), leaves)
    for _ in range(1 if SMALL and impl is TRITON else 3):
        again = torch.autograd.grad(call(leaves, targets, impl).logprob.sum(), leaves)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("rows", [1, 5, 900])
@pytest.mark.parametrize("top_k", [1, 7, 60])
def test_top_k_tokens(impl, rows, top_k):
    few = SMALL and impl is TRITON
    tensors, targets, _ = problem(min(rows, 30) if few else rows, 12, 90 if few else 4300, torch.float32)
    tensors[1][60:80] = tensors[1][50]  # equal logits: the lower id first
    tensors[1][-2] = tensors[1][50]
    result = call(tensors, targets, impl, top_k=top_k)
    log_p = linear(*tensors, impl=impl.option)
    wanted = torch.sort(log_p, dim=-1, descending=True, stable=True)
    assert torch.equal(result.top_ids, wanted.indices[:, :top_k])
    torch.testing.assert_close(result.top_logprobs, wanted.values[:, :top_k] - result.lse[:, None], rtol=0,
                               atol=1e-5 if impl is TRITON else 0.0)  # fmt: skip
    assert not result.top_logprobs.requires_grad


def test_extreme_values(impl):
    words = 300 if SMALL and impl is TRITON else 3000
    hidden = torch.eye(6)
    columns = seeded(6, words, dtype=torch.float32)
    columns[0] *= 1e4
    columns[1, : words * 5 // 6] = -1e30  # a block without probability
    columns[2] = 0.0
    columns[4, 7] = torch.nan
    columns[5, words - 1] = torch.inf
    targets = torch.tensor([5, words * 13 // 15, 3, 4, 6, 8])
    result = linear_logprob(hidden[:3], columns[:3, :].T.contiguous() @ torch.eye(3, 6), targets[:3], impl=impl.option)
    wanted = oracle([torch.eye(3).double(), columns[:3].T.double()], targets[:3])
    assert max(map(error, result[:3], wanted[:3])) < 1e-6
    assert result.entropy[2] == pytest.approx(math.log(words), rel=1e-6)
    weight = torch.nan_to_num(columns.T, nan=0.0, posinf=0.0).contiguous()
    poisoned = linear_logprob(torch.tensor([[1.0] * 6, [torch.nan] * 6]), weight, targets[:2], impl=impl.option)
    assert poisoned.logprob[0].isfinite()
    assert all(value[1].isnan() for value in poisoned[:4])


def test_impossible_tokens(impl):
    """A bias of -inf takes tokens out: probability 0, no gradient, finite statistics but the mean."""
    tensors, _, _ = problem(4, 8, 40, torch.float32, "bias")
    tensors[2][10:30] = -torch.inf
    leaves = [x.requires_grad_() for x in tensors]
    result = call(leaves, torch.tensor([1, 2, 3, 35]), impl)
    kept = [*range(10), *range(30, 40)]
    small = [tensors[0], tensors[1][kept], tensors[2][kept]]
    wanted = oracle([x.detach().double() for x in small], torch.tensor([1, 2, 3, 15]))
    assert max(map(error, (x.detach() for x in result[:3]), wanted[:3])) < 1e-6
    gradients = torch.autograd.grad(result.logprob.sum() + result.entropy.sum(), leaves)
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[1][10:30].any()


def test_strided_inputs(impl):
    base, weight = seeded(4, 6, 40, dtype=impl.dtypes[0]), seeded(100, 40, dtype=impl.dtypes[0], seed=1)
    targets = torch.arange(24).view(4, 6)
    for hidden, w, y in (
        (base[..., :20], weight[:, 20:], targets),
        (base.transpose(0, 1)[..., ::2], weight[::2, ::2], targets.T),
        (base[..., :20], weight.T.contiguous().T[:, :20], targets),
    ):
        got = linear_logprob(hidden, w, y, impl=impl.option)
        wanted = oracle([hidden.reshape(24, 20).double(), w.double()], y.reshape(24))
        assert max(error(a.reshape(24), b) for a, b in zip(got[:4], wanted)) < impl.near(1e-12)
        assert got.lse.shape == y.shape


def test_under_checkpointing(impl):
    results = []
    for use in (False, True):
        tensors, targets, _ = problem(9, 20, 90 if SMALL and impl is TRITON else 300)
        hidden, weight = (x.requires_grad_() for x in tensors)
        f = lambda h, w, y=targets: linear_logprob(h, w, y, impl=impl.option).logprob  # noqa: E731
        (checkpoint(f, hidden, weight, use_reentrant=False) if use else f(hidden, weight)).sum().backward()
        results.append((hidden.grad, weight.grad))
    assert all(map(torch.equal, *results))


def test_bad_input_is_named(impl):
    hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
    with pytest.raises(ToolkitError, match=r"targets must have shape \[2\] or .* hidden of shape \[2, 3\], got \[3\]"):
        linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64), impl=impl.option)
    with pytest.raises(ToolkitError, match="top_k must be >= 0 and <= the vocabulary size 5, got 6"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), top_k=6, impl=impl.option)
    with pytest.raises(ToolkitError, match=r"temperature must be > 0, got 0.0"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), temperature=0.0, impl=impl.option)
    if SMALL or impl is not TRITON:  # on a device nothing is read back: the row is NaN
        for wrong in (5, -1, -200):
            with pytest.raises(IndexError, match=rf"targets must be -100 or a token id from 0 to 4, got {wrong}\."):
                linear_logprob(hidden, weight, torch.tensor([0, wrong]), impl=impl.option)


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_opcheck(variant):
    tensors, targets, options = problem(3, 4, 9, torch.float32, variant, choices=2)
    bias = tensors[2].requires_grad_() if len(tensors) > 2 else None
    temperature = options.get("temperature")
    scale, softcap = options.get("scale", 1.0), options.get("softcap", 0.0)
    hidden, weight = (x.requires_grad_() for x in tensors[:2])
    arguments = (hidden, weight, bias, targets, temperature, scale, softcap, 2)
    torch.library.opcheck(torch.ops.toolkit.linear_logprob.default, arguments)
    detached = [None if x is None else x.detach() for x in (hidden, weight, bias)]
    logprob, lse, entropy, mean, *_ = torch.ops.toolkit.linear_logprob(
        *detached, targets, temperature, scale, softcap, 0
    )
    gradients = (logprob, lse, entropy, mean, *detached, targets, temperature, lse, entropy, scale, softcap)
    torch.library.opcheck(torch.ops.toolkit.linear_logprob_backward.default, (*gradients, True, True, bias is not None))
