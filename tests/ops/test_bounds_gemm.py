"""linear and lora_linear: against float64, to a bound of every element, and the bits of a row."""

import math
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
    matrix_noise,
    noise,
    rounded,
    subsets,
)
from tests.helpers.implementations import (
    FLOATS,
    HALF,
    SMALL,
    TRITON,
    impl_and_dtype,
    needs_cuda,
)
from toolkit.ops.linear import linear
from toolkit.ops.lora_linear import lora_linear

ROWS = 37 if SMALL else 301
# (K, N): whole steps of aligned rows; rows of whole vectors with a part of a step; nothing aligned.
SHAPES = [(64, 40), (48, 25), (33, 17)] if SMALL else [(512, 4224), (400, 264), (133, 77)]


@pytest.fixture(autouse=True)
def small_parts():
    """In the interpreter: several splits and chunks at small sizes."""
    if not SMALL:
        yield
        return
    from toolkit.ops.lora_linear import tiles

    with mock.patch.multiple(tiles, SPLIT=64, SUMMED_ROWS=32):
        yield


def product(depth, outputs, dtype, rows=ROWS):
    values = noise(rows, depth, dtype=dtype), noise(outputs, depth, dtype=dtype, scale=depth**-0.5, seed=1)
    return *values, noise(outputs, dtype=dtype, seed=2)


@impl_and_dtype(FLOATS)
@pytest.mark.parametrize(("depth", "outputs"), SHAPES)
def test_linear(impl, dtype, depth, outputs):
    x, weight, bias = product(depth, outputs, dtype)
    grad = [noise(ROWS, outputs, dtype=dtype, seed=3)]
    exact = evaluate(torch.nn.functional.linear, doubles(x), doubles(weight, bias), doubles(*grad))
    got = evaluate(linear, [x], [weight, bias], grad)
    # Matrix units truncate what they add; the gradients are MKL's products, which may add in 16 bits.
    assert_all_near(got[:1], exact[:1], extra=matrix_noise(dtype))
    assert_all_near(got[1:], exact[1:], extra=NOISE if dtype == torch.float32 else 2 * UNIT[dtype])
    for values, repeat in zip(got, evaluate(linear, [x], [weight, bias], grad), strict=True):
        assert_same_bits(values, repeat)
    assert_near(linear(x, weight), x.double() @ weight.double().T, extra=matrix_noise(dtype))


@impl_and_dtype(FLOATS)
@pytest.mark.parametrize(("depth", "outputs"), SHAPES[:2])
def test_linear_keeps_the_bits_of_a_row(impl, dtype, depth, outputs):
    x, weight, bias = product(depth, outputs, dtype)
    y = linear(x, weight, bias)
    for part in subsets(ROWS):
        assert torch.equal(linear(x[part], weight, bias), y[part])
    for begin in range(0, ROWS, 97):
        assert torch.equal(linear(x[begin : begin + 1], weight, bias), y[begin : begin + 1])
        assert torch.equal(linear(x[begin : begin + 17], weight, bias), y[begin : begin + 17])
    joined = torch.cat([x, x], -1)
    assert torch.equal(linear(joined[:, depth:], weight, bias), y)
    assert torch.equal(linear(x[None, :, None], weight, bias)[0, :, 0], y)
    x[3] = math.nan
    others = torch.arange(ROWS) != 3
    assert torch.equal(linear(x, weight, bias)[others], y[others])
    assert linear(x[:0], weight, bias).shape == (0, outputs)


@impl_and_dtype(FLOATS, [TRITON])
def test_linear_decode_tiles_have_the_bits_of_the_others(impl, dtype):
    """Held where ``measured_tiles.json`` has one; ``python -m tools.tile_sweep`` finds out which would do."""
    from benchmarks.gpu.tile_invariance import unrounded
    from toolkit.ops.linear import tiles
    from toolkit.ops.tiles import DECODE_ROWS
    from toolkit.ops.triton_devices import architecture

    for limit, tile in tiles.TABLE.entries[architecture(impl.device)][dtype.itemsize]:
        outputs = limit or (40 if SMALL else 9728)
        for depth in (64, 48) if SMALL else (2560, 2576):
            x, weight, _ = product(depth, outputs, dtype, rows=DECODE_ROWS)
            wanted = unrounded(x, weight, tile)
            for rows in (1, 3, DECODE_ROWS):
                got = unrounded(x[:rows], weight, tiles.find(x.device, dtype, outputs, depth, rows))
                assert torch.equal(got, wanted[:rows])


@needs_cuda
def test_linear_past_two_to_the_31_elements(impl):
    """Once of outputs, once of weights."""
    rows, outputs = 70000, 32768
    x, weight, _ = product(64, outputs, torch.bfloat16, rows=rows)
    y = linear(x, weight)
    assert y.numel() > 1 << 31
    assert torch.equal(y[-9:], linear(x[-9:], weight))
    assert_near(y[-9:], x[-9:].double() @ weight.double().T, extra=matrix_noise(HALF))
    del y
    weight = torch.zeros(70000, 32768, dtype=torch.bfloat16)
    weight[-5:] = noise(5, 32768, dtype=torch.bfloat16)
    x = noise(3, 32768, dtype=torch.bfloat16, seed=4)
    y = linear(x, weight)
    assert_near(y[:, -5:], x.double() @ weight[-5:].double().T, extra=32 * matrix_noise(HALF))  # 32,768 terms
    del weight
    torch.cuda.empty_cache()


def adapters_of(depth, outputs, dtype, ranks=(12, 3, 40, 16)):
    a = [noise(rank, depth, dtype=dtype, scale=depth**-0.5, seed=5 + at) for at, rank in enumerate(ranks)]
    b = [noise(outputs, rank, dtype=dtype, scale=rank**-0.5, seed=16 + at) for at, rank in enumerate(ranks)]
    scaling = [0.5, 1.0, 1.5, 2.0]
    return a, b, scaling, integers(-1, len(ranks) - 1, ROWS, seed=7)  # the last adapter has no row


def dense_lora(x, weight, bias, a, b, scaling, adapters, dtype):
    base = rounded(torch.nn.functional.linear(x, weight, bias), dtype)
    deltas = [factor * (x @ first.T) @ second.T for first, second, factor in zip(a, b, scaling, strict=True)]
    return base + sum(delta * (adapters == at)[:, None] for at, delta in enumerate(deltas))


@impl_and_dtype(FLOATS)
@pytest.mark.parametrize(("depth", "outputs"), SHAPES)
def test_lora_linear(impl, dtype, depth, outputs):
    x, weight, bias = product(depth, outputs, dtype)
    a, b, scaling, adapters = adapters_of(depth, outputs, dtype)
    grad = [noise(ROWS, outputs, dtype=dtype, seed=8)]

    def call(x, weight, bias, *factors):
        return lora_linear(x, weight, bias, factors[:4], factors[4:], scaling, adapters)

    def oracle(x, weight, bias, *factors):
        return dense_lora(x, weight, bias, factors[:4], factors[4:], scaling, adapters, dtype)

    params = [weight, bias, *a, *b]
    got = evaluate(call, [x], params, grad)
    exact = evaluate(oracle, doubles(x), doubles(*params), doubles(*grad))
    # The base is rounded at its own size, and 16-bit gradients to x and weight are sums of rounded parts.
    half = 0.0 if dtype == torch.float32 else UNIT[dtype]
    assert_all_near(got[:1], exact[:1], extra=matrix_noise(dtype) + half)
    assert_all_near(got[1:], exact[1:], extra=2 * matrix_noise(dtype) + 2 * half, units=2.0)
    for values, repeat in zip(got, evaluate(call, [x], params, grad), strict=True):
        assert_same_bits(values, repeat)
    assert torch.equal(got[0][0][adapters < 0], linear(x, weight, bias)[adapters < 0])
    assert int(torch.count_nonzero(got[2][5])) == 0
    (y,), (dx,), _ = got
    for part in subsets(ROWS):
        some = lora_linear(x[part], weight, bias, a, b, scaling, adapters[part])
        assert torch.equal(some, y[part])
    keep = integers(0, 2, ROWS, seed=9).bool()
    others = torch.where(keep, adapters, integers(-1, 4, ROWS, seed=10))
    assert torch.equal(lora_linear(x, weight, bias, a, b, scaling, others)[keep], y[keep])
    assert lora_linear(x[:0], weight, bias, a, b, scaling, adapters[:0]).shape == (0, outputs)
    assert dx.shape == x.shape
