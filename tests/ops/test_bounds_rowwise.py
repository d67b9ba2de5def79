"""Row-wise ops: float64 oracles, forward and every gradient, to a bound of every element; and the bits of a row."""

import math
from dataclasses import dataclass

import pytest
import torch

from tests.helpers.bounds import assert_near, assert_same_bits, evaluate, integers, noise, rounded, subsets
from tests.helpers.implementations import (
    FLOATS,
    HALF,
    IMPLEMENTATIONS,
    SMALL,
    TRITON,
    impl_and_dtype,
    needs_cuda,
    parameter,
)
from toolkit.ops.activation import activation
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.layer_norm import layer_norm
from toolkit.ops.rms_norm import add_rms_norm, rms_norm
from toolkit.ops.rotary import rotary, rotary_tables
from toolkit.ops.state_write import state_write
from toolkit.ops.token_logprob import token_logprob

ROWS = 21 if SMALL else 333
EPS = 1e-6
HEADS = 3


@dataclass
class Op:
    """An op of rows: ``call(*rows, *params)``; ``make(rows, width, dtype)`` gives both lists.

    still: of the row tensors, how many at the end take no gradient. step: widths are multiples of it.
    """

    call: object
    oracle: object
    make: object
    still: int = 0
    step: int = 1


def rms(x, weight=None, offset=0.0):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * (offset + weight)


def added(x, residual, weight, dtype):
    total = rounded(x + residual, dtype)
    return rms(total, weight, 1.0), total


def normed(x, weight, bias):
    centered = x - x.mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + EPS) * weight + bias


def turned(x, cos, sin, interleaved=False):
    """Pairs of the first R channels rotated by complex numbers."""
    count = cos.shape[-1] // 2
    c, s = cos[:, None, :count], sin[:, None, :count]
    if interleaved:
        a, b = x[..., 0 : 2 * count : 2], x[..., 1 : 2 * count : 2]
        first = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = x[..., :count], x[..., count : 2 * count]
        first = torch.cat([a * c - b * s, b * c + a * s], -1)
    return torch.cat([first, x[..., 2 * count :]], -1)


def logprobs(logits, targets):
    lse = torch.logsumexp(logits, -1)
    own = logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0] - lse
    return torch.where(targets < 0, 0.0, own), lse


ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.erfc(-x * math.sqrt(0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp_min(0),
    "relu2": lambda x: x.clamp_min(0) ** 2,
}


def swiglu(gate, up):
    g, u = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return g * torch.sigmoid(1.702 * g) * (u + 1)


def matrix(count, params=0, scale=1.0):
    """``count`` matrices and ``params`` parameters of a row."""

    def make(rows, width, dtype):
        values = [noise(rows, width, dtype=dtype, scale=scale, seed=i) for i in range(count)]
        return values, [noise(width, dtype=dtype, seed=9 + i) for i in range(params)]

    return make


def heads(rows, width, dtype):
    """x [T, H, D] of which 3/4 of the channels turn, and tables."""
    rotated = max(width * 3 // 4 // 2 * 2, 2)
    angles = noise(rows, rotated // 2, scale=3.0, seed=5)
    cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    return [noise(rows, HEADS, width, dtype=dtype), cos, sin], []


def vocabulary(rows, width, dtype):
    targets = integers(-width // 4, width, rows, seed=3)
    targets = torch.where(targets < 0, -100, targets)
    return [noise(rows, width, dtype=dtype, scale=3.0), targets], []


OPS = {
    "rms_norm": Op(lambda x, w: rms_norm(x, w, EPS, 1.0), lambda x, w: rms(x, w, 1.0), matrix(1, 1)),
    "rms_norm plain": Op(lambda x: rms_norm(x, None, EPS), rms, matrix(1)),
    "add_rms_norm": Op(lambda x, r, w: add_rms_norm(x, r, w, EPS, 1.0), None, matrix(2, 1)),
    "layer_norm": Op(lambda x, w, b: layer_norm(x, w, b, EPS), normed, matrix(1, 2)),
    "rotary half": Op(rotary, turned, heads, still=2),
    "rotary interleaved": Op(lambda *a: rotary(*a, True), lambda *a: turned(*a, True), heads, still=2, step=2),
    "token_logprob": Op(token_logprob, logprobs, vocabulary),
    **{
        f"activation {kind}": Op(lambda x, kind=kind: activation(x, kind), oracle, matrix(1, scale=3.0))
        for kind, oracle in ACTIVATIONS.items()
    },
    **{
        f"gated {kind}": Op(
            lambda g, u, kind=kind: gated_activation(g, u, kind),
            lambda g, u, oracle=oracle: oracle(g) * u,
            matrix(2, scale=3.0),
        )
        for kind, oracle in ACTIVATIONS.items()
    },
    "gated clamped_swiglu": Op(lambda g, u: gated_activation(g, u, "clamped_swiglu"), swiglu, matrix(2, scale=5.0)),
}
# Every one of these in every dtype; other kinds of activation share their kernels and are compiled less often.
MAIN = [name for name in OPS if name.split()[-1] not in ("gelu", "gelu_tanh", "relu", "relu2")]
OTHERS = [name for name in OPS if name not in MAIN]
# 67: nothing is aligned. 1008: rows of whole vectors.
CASES = [(name, dtype, width) for name in MAIN for dtype in FLOATS for width in (67, 160 if SMALL else 1008)]
CASES += [(name, dtype, width) for name in OTHERS for dtype, width in ((torch.float32, 160), (HALF, 67))]
# Rows that the norms' backward walks in blocks instead of holding them.
CASES += [(name, torch.float32, 4104) for name in ("rms_norm", "add_rms_norm", "layer_norm")]
CASES += [("token_logprob", HALF, 9003)]


def repeats(name, dtype, width):
    """A 16-bit case at a width that float32 has too, or kinds of one kernel: of the sweep in Triton's interpreter."""
    return dtype != torch.float32 and width != 160


def made(name, rows, width, dtype):
    """(op, row tensors, params, a cotangent for each output)."""
    op = OPS[name]
    values, params = op.make(rows, -(-width // op.step) * op.step, dtype)
    outputs = op.call(*values, *params)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return op, values, params, [noise(*y.shape, dtype=y.dtype, seed=20 + i) for i, y in enumerate(outputs)]


@pytest.mark.parametrize(
    ("impl", "name", "dtype", "width"),
    [
        parameter(impl, *case, marks=[pytest.mark.sweep] if SMALL and impl is TRITON and repeats(*case) else [])
        for impl in IMPLEMENTATIONS
        for case in CASES
        if case[1] in impl.dtypes
    ],
    indirect=["impl"],
)
def test_values_and_gradients_match_float64(impl, name, dtype, width):
    op, rows, params, cotangents = made(name, ROWS, width, dtype)
    oracle = op.oracle or (lambda x, r, w: added(x, r, w, dtype))
    upcast = [[x.double() if x.is_floating_point() else x for x in group] for group in (rows, params)]
    exact = evaluate(oracle, *upcast, [g.double() for g in cotangents], op.still)
    got = evaluate(op.call, rows, params, cotangents, op.still)
    for values, wanted in zip(got, exact, strict=True):
        for value, one in zip(values, wanted, strict=True):
            assert value.is_contiguous()
            assert_near(value, one)
    again = evaluate(op.call, rows, params, cotangents, op.still)
    for values, repeat in zip(got, again, strict=True):
        assert_same_bits(values, repeat)


@impl_and_dtype([torch.float32, HALF])
@pytest.mark.parametrize("name", MAIN)
def test_a_row_keeps_its_bits(impl, name, dtype):
    op, rows, params, cotangents = made(name, ROWS, 160 if SMALL else 1008, dtype)
    outputs, grads, _ = evaluate(op.call, rows, params, cotangents, op.still)
    for part in subsets(ROWS):
        some, some_grads, _ = evaluate(
            op.call, [x[part] for x in rows], params, [g[part] for g in cotangents], op.still
        )
        assert_same_bits(some, [y[part] for y in outputs])
        assert_same_bits(some_grads, [g[part] for g in grads])
    broken = [x.clone() for x in rows]
    broken[0][ROWS // 2] = math.nan
    keep = torch.arange(ROWS) != ROWS // 2
    some, some_grads, _ = evaluate(op.call, broken, params, cotangents, op.still)
    assert_same_bits([y[keep] for y in some], [y[keep] for y in outputs])
    assert_same_bits([g[keep] for g in some_grads], [g[keep] for g in grads])


@pytest.mark.parametrize("name", MAIN)
def test_no_rows_and_strided_rows(impl, name, record_property):
    op, rows, params, cotangents = made(name, ROWS, 160 if SMALL else 1008, HALF)
    empty, none = [x[:0] for x in rows], [g[:0] for g in cotangents]
    for value, full in zip(evaluate(op.call, empty, params, none, op.still)[0], none, strict=True):
        assert value.shape == full.shape
    outputs, grads, _ = evaluate(op.call, rows, params, cotangents, op.still)

    def spread(x):
        """The same numbers in every second row of a wider matrix whose rows start at odd indices."""
        if x.dim() == 1:
            return torch.stack([x, x], -1)[:, 0]
        room = torch.full(
            (2 * x.shape[0], *x.shape[1:-1], x.shape[-1] + 3),
            math.nan,
            dtype=x.dtype,
        )
        view = room[::2, ..., 1 : 1 + x.shape[-1]]
        return view.copy_(x)

    apart = [[spread(x) for x in group] for group in (rows, cotangents)]
    some, some_grads, _ = evaluate(op.call, apart[0], params, apart[1], op.still)
    # Sums along a row may be laid out otherwise over threads where loads cannot be vectors: near, and equal is noted.
    record_property("strided_has_the_bits", str(all(map(torch.equal, [*some, *some_grads], [*outputs, *grads]))))
    for value, wanted in zip([*some, *some_grads], [*outputs, *grads], strict=True):
        assert_near(value, wanted.double(), units=2.0)


@pytest.mark.parametrize("axes", [False, True])
def test_rotary_tables(impl, axes):
    inv_freq = (10000.0 ** (-torch.arange(0, 40, dtype=torch.float64) / 40)).float().to(torch.get_default_device())
    positions = integers(0, 200_000, *((3, ROWS) if axes else (ROWS,)))
    axis = torch.arange(40) % 3 if axes else None
    more = {"axes": axis} if axes else {}
    index = positions[axis].T if axes else positions[:, None]
    angle = (index.float() * inv_freq).double()
    angle = torch.cat([angle, angle], -1)
    for dtype in (torch.float32, HALF):
        tables = rotary_tables(positions, inv_freq, 0.7, dtype, **more)
        for table, exact in zip(tables, (0.7 * angle.cos(), 0.7 * angle.sin()), strict=True):
            assert table.dtype == dtype
            assert_near(table, exact, extra=2.0**-23)
        part = rotary_tables(positions[..., 4:9].contiguous(), inv_freq, 0.7, dtype, **more)
        assert_same_bits(part, [table[4:9] for table in tables])


@impl_and_dtype(FLOATS)
def test_state_write(impl, dtype):
    rows, slots, heads, width = ROWS, 3 * ROWS, 3, 40
    new = noise(rows, 2 * heads, width, dtype=dtype)[:, ::2]
    at = torch.randperm(slots, generator=torch.Generator().manual_seed(0), device="cpu")[:rows].to(
        torch.get_default_device()
    )
    at[::4] = -1
    pool = noise(slots, heads, width, dtype=HALF, seed=1)
    wanted = pool.clone()
    wanted[at[at >= 0]] = new[at >= 0].to(HALF)
    state_write(pool, new, at)
    assert torch.equal(pool, wanted)
    state_write(pool, new[:0], at[:0])
    state_write(pool, new, torch.full_like(at, -1))
    assert torch.equal(pool, wanted)


@needs_cuda
@pytest.mark.parametrize("name", MAIN)
def test_rows_past_two_to_the_31_elements(impl, name):
    """Inputs, outputs and gradients of more than 2^31 elements; the far rows against the same rows alone."""
    width = 128 if name.startswith("rotary") else 8192
    count = (1 << 31) // (width * (HEADS if name.startswith("rotary") else 1)) + 5
    far = slice(count - 8, count)
    op, rows, params, cotangents = made(name, 8, width, torch.bfloat16)
    large = [torch.zeros(count, *x.shape[1:], dtype=x.dtype) for x in rows]
    upstream = [torch.zeros(count, *g.shape[1:], dtype=g.dtype) for g in cotangents]
    for room, values in zip([*large, *upstream], [*rows, *cotangents], strict=True):
        room[far] = values
    assert large[0].numel() > 1 << 31
    got, got_grads, _ = evaluate(op.call, large, params, upstream, op.still)
    wanted, wanted_grads, _ = evaluate(op.call, rows, params, cotangents, op.still)
    assert_same_bits([y[far] for y in got], wanted)
    assert_same_bits([g[far] for g in got_grads], wanted_grads)
    del large, upstream, got, got_grads
    torch.cuda.empty_cache()


@needs_cuda
def test_state_written_past_two_to_the_31_elements(impl):
    pool = torch.zeros((1 << 31) // 1024 + 9, 8, 128, dtype=torch.bfloat16)
    new = noise(2, 8, 128, dtype=torch.bfloat16)
    state_write(pool, new, torch.tensor([pool.shape[0] - 1, 3]))
    assert torch.equal(pool[[pool.shape[0] - 1, 3]], new)
    assert int(torch.count_nonzero(pool[4:-1])) == 0
    del pool
    torch.cuda.empty_cache()
