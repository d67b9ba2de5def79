"""linear_logprob: against float64, to a bound of every element, the bits of a row, and more logits than fit."""

from unittest import mock

import pytest
import torch

from tests.helpers.bounds import (
    NOISE,
    UNIT,
    assert_all_near,
    assert_near,
    assert_same_bits,
    doubles,
    evaluate,
    integers,
    noise,
    rounded,
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
from toolkit.ops.linear import linear
from toolkit.ops.linear_logprob import linear_logprob


@pytest.fixture(autouse=True)
def small_parts():
    """In the interpreter: several splits and chunks at small sizes."""
    if not SMALL:
        yield
        return
    from toolkit.ops.linear_logprob import tiles

    with mock.patch.multiple(tiles, SPLIT=32, CHUNK=48):
        yield


VARIANTS = {"plain": (False, 1.0, 0.0, False), "everything": (True, 1.5, 3.0, True)}
# rows, K, V
HEAD_SHAPES = [(21, 40, 70), (7, 33, 45)] if SMALL else [(301, 256, 5003), (45, 133, 77)]


def head(rows, depth, size, dtype, variant):
    """Tensors and settings of a head; a third of the targets is ignored."""
    biased, scale, softcap, heated = VARIANTS[variant]
    hidden, weight = noise(rows, depth, dtype=dtype), noise(size, depth, dtype=dtype, scale=1.5 * depth**-0.5, seed=1)
    bias = noise(size, dtype=dtype, seed=2) if biased else None
    targets = integers(-size // 2, size, rows, seed=3)
    targets = torch.where(targets < 0, -100, targets)
    heat = torch.linspace(0.6, 1.5, rows, dtype=torch.float64) if heated else None
    return hidden, weight, bias, targets, heat, scale, softcap


def dense_head(hidden, weight, bias, targets, heat, scale, softcap, dtype):
    z = rounded(torch.nn.functional.linear(hidden, weight, bias), dtype) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z if heat is None else z / heat[:, None]
    log_p = torch.log_softmax(z, -1)
    own = torch.where(targets < 0, 0.0, log_p.gather(-1, targets.clamp_min(0)[:, None])[:, 0])
    return own, torch.logsumexp(z, -1), -(log_p.exp() * log_p).sum(-1), z.mean(-1)


def head_calls(targets, heat, scale, softcap, dtype):
    """(ours, oracle), of hidden, weight and perhaps bias."""

    def ours(hidden, weight, bias=None):
        more = {} if heat is None else {"temperature": heat}
        return linear_logprob(hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, **more)[:4]

    def oracle(hidden, weight, bias=None):
        return dense_head(hidden, weight, bias, targets, heat, scale, softcap, dtype)

    return ours, oracle


@impl_and_dtype(FLOATS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "depth", "size"), HEAD_SHAPES)
def test_linear_logprob(impl, dtype, variant, rows, depth, size):
    hidden, weight, bias, targets, *settings = head(rows, depth, size, dtype, variant)
    ours, oracle = head_calls(targets, *settings, dtype)
    params = [weight] if bias is None else [weight, bias]
    cotangents = [noise(rows, seed=10 + i) for i in range(4)]
    got = evaluate(ours, [hidden], params, cotangents)
    exact = evaluate(oracle, doubles(hidden), doubles(*params), doubles(*cotangents))
    # A product that lies on the edge of two 16-bit numbers may be rounded to either: a unit of one logit.
    assert_all_near(got[:1], exact[:1], extra=NOISE if dtype == torch.float32 else UNIT[dtype])
    # Gradients to the logits are rounded to the dtype of hidden, as a head's are, and then summed.
    assert_all_near(got[1:], exact[1:], extra=2 * NOISE if dtype == torch.float32 else UNIT[dtype], units=2.0)
    for values, repeat in zip(got, evaluate(ours, [hidden], params, cotangents), strict=True):
        assert_same_bits(values, repeat)


@impl_and_dtype([torch.float32, HALF], [NATIVE, TRITON])
@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_logprob_keeps_the_bits_of_a_row(impl, dtype, variant):
    rows, depth, size = HEAD_SHAPES[0]
    hidden, weight, bias, targets, heat, *shape = head(rows, depth, size, dtype, variant)
    params = [weight] if bias is None else [weight, bias]
    cotangents = [noise(rows, seed=10 + i) for i in range(4)]
    outputs, (dx,), _ = evaluate(head_calls(targets, heat, *shape, dtype)[0], [hidden], params, cotangents)
    for part in subsets(rows):
        ours, _ = head_calls(targets[part], None if heat is None else heat[part], *shape, dtype)
        some, (some_dx,), _ = evaluate(ours, [hidden[part]], params, [g[part] for g in cotangents])
        assert_same_bits(some, [y[part] for y in outputs])
        assert torch.equal(some_dx, dx[part])
    empty = linear_logprob(hidden[:0], weight, targets[:0], bias=bias)
    assert empty.logprob.shape == (0,)


@impl_and_dtype([torch.float32, HALF])
def test_linear_logprob_candidates_and_top_k(impl, dtype):
    rows, depth, size = HEAD_SHAPES[0]
    hidden, weight, *_ = head(rows, depth, size, dtype, "plain")
    targets = integers(-3, size, rows, 4, seed=11)
    targets = torch.where(targets < 0, -100, targets)
    got = linear_logprob(hidden, weight, targets, top_k=5)
    z = linear(hidden, weight).double()
    log_p = torch.log_softmax(z, -1)
    wanted = torch.where(targets < 0, 0.0, log_p.gather(-1, targets.clamp_min(0)))
    edge = NOISE if dtype == torch.float32 else UNIT[dtype]  # see test_linear_logprob
    assert_near(got.logprob, wanted, extra=edge)
    order = torch.sort(z, descending=True, stable=True).indices[:, :5]
    assert torch.equal(got.top_ids, order)
    assert_near(got.top_logprobs, log_p.gather(-1, order), extra=edge)


@needs_cuda
def test_linear_logprob_of_more_logits_than_two_to_the_31(impl):
    """16,384 rows of vocabulary size 151,936, forward and backward: the last rows against the same rows alone."""
    rows, depth, size = 16384, 128, 151936
    hidden, weight = noise(rows, depth, dtype=HALF), noise(size, depth, dtype=HALF, scale=0.1, seed=1)
    targets = integers(0, size, rows, seed=2)
    cotangents = [noise(rows, seed=3), torch.zeros(rows)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def call(part):
        return lambda x, w: linear_logprob(x, w, targets[part])[:2]

    (logprob, lse), (dx,), _ = evaluate(call(slice(None)), [hidden], [weight], cotangents)
    assert torch.cuda.max_memory_allocated() - before < rows * size * 2 / 4
    part = slice(rows - 9, rows)
    some, (some_dx,), _ = evaluate(call(part), [hidden[part]], [weight], [g[part] for g in cotangents])
    assert_same_bits([*some, some_dx], [logprob[part], lse[part], dx[part]])
