"""Norm, rotation and state write as one op: bit for bit the ops one after the other."""

import pytest
import torch

from tests.helpers.implementations import TRITON, impl_and_dtype
from toolkit.ops.int8_rows import int8_codes
from toolkit.ops.registry import has_native
from toolkit.ops.rms_norm import rms_norm
from toolkit.ops.rotary import rotary, rotary_tables
from toolkit.ops.rotary_write import rotary_write, rotary_write_int8
from toolkit.ops.state_write import state_write

IMPLS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not has_native("rotary_write"), reason="no library")),
]


def numbers(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(tokens, heads, kv_heads, width, value_width, rotated, dtype, normed, seed=0):
    """Arguments of ``rotary_write`` up to the pools, and the slots; some are skipped."""
    q = numbers(1, tokens, heads * width, seed=seed, dtype=dtype)
    k = numbers(1, tokens, kv_heads * width, seed=seed + 1, dtype=dtype)
    v = numbers(1, tokens, kv_heads * value_width, seed=seed + 2, dtype=dtype)
    weights = [numbers(width, seed=seed + 3 + at, dtype=dtype) if normed == "weights" else None for at in range(2)]
    positions = torch.randint(0, 5000, (tokens,), generator=torch.Generator().manual_seed(seed))
    frequencies = 1.0 / 10000 ** (torch.arange(rotated // 2) / max(1, rotated // 2))
    cos, sin = rotary_tables(positions, frequencies, 1.0, dtype)
    slots = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(seed))[:tokens]
    slots[1::3] = -1
    return (q, k, v, *weights, 1e-6 if normed else None, 1.0 if normed else 0.0, cos, sin), slots


def pools(tokens, kv_heads, width, value_width, dtype):
    return [torch.full((3 * tokens, kv_heads, size), float("nan"), dtype=dtype) for size in (width, value_width)]


def one_after_the_other(arguments, interleaved, keys, values, slots):
    q, k, v, q_weight, k_weight, eps, offset, cos, sin = arguments
    tokens = len(slots)
    q, k = (x.view(tokens, -1, keys.shape[2]) for x in (q, k))
    if eps is not None:
        q, k = rms_norm(q, q_weight, eps, offset), rms_norm(k, k_weight, eps, offset)
    state_write(keys, rotary(k, cos, sin, interleaved), slots)
    state_write(values, v.view(tokens, -1, values.shape[2]), slots)
    return rotary(q, cos, sin, interleaved)


def exact_rotation(arguments, keys, values, slots):
    """In plain torch, of float64 arguments in the half layout that all have a norm."""
    q, k, v, *weights, eps, offset, cos, sin = arguments
    results = []
    for x, weight in ((q, weights[0]), (k, weights[1])):
        x = x.view(len(slots), -1, keys.shape[2])
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (offset + weight)
        turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        results.append(x * cos[:, None] + turned * sin[:, None])
    for pool, rows in ((keys, results[1]), (values, v.view(len(slots), -1, values.shape[2]))):
        pool[slots[slots >= 0]] = rows[slots >= 0]
    return results[0]


def same(found, expected):
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


SIZES = [(1, 4, 2, 64, 64, 64), (5, 3, 1, 10, 6, 10), (7, 6, 6, 24, 24, 8), (33, 2, 1, 130, 7, 96), (2, 1, 1, 2, 1, 2)]


@impl_and_dtype()
@pytest.mark.parametrize("normed", ["", "weights", "plain"])
def test_bits_are_those_of_the_ops_one_after_the_other(impl, dtype, normed):
    for at, (tokens, heads, kv_heads, width, value_width, rotated) in enumerate(SIZES[:2] if impl is TRITON else SIZES):
        arguments, slots = problem(tokens, heads, kv_heads, width, value_width, rotated, dtype, normed, seed=10 * at)
        for interleaved in (False, True):
            ours, theirs = (pools(tokens, kv_heads, width, value_width, dtype) for _ in range(2))
            found = rotary_write(*arguments, interleaved, *ours, slots, impl=impl.option)
            expected = one_after_the_other(arguments, interleaved, *theirs, slots)
            assert found.shape == (tokens, heads, width)
            assert torch.equal(found, expected)
            assert same(ours[0], theirs[0])
            assert same(ours[1], theirs[1])


@impl_and_dtype()
@pytest.mark.parametrize("normed", ["", "weights"])
def test_pools_of_eight_bits_hold_the_codes_of_the_same_rows(impl, dtype, normed):
    for at, (tokens, heads, kv_heads, width, value_width, rotated) in enumerate(SIZES[:2] if impl is TRITON else SIZES):
        arguments, slots = problem(tokens, heads, kv_heads, width, value_width, rotated, dtype, normed, seed=10 * at)
        theirs = pools(tokens, kv_heads, width, value_width, dtype)
        expected = rotary_write(*arguments, False, *theirs, slots, impl=impl.option)
        ours = [
            torch.full((3 * tokens, kv_heads, size), 99, dtype=kind)
            for value in (width, value_width)
            for size, kind in ((value, torch.int8), (1, torch.float32))
        ]
        found = rotary_write_int8(*arguments, False, *ours, slots, impl=impl.option)
        assert torch.equal(found, expected)
        written = slots[slots >= 0]
        others = [slot for slot in range(3 * tokens) if slot not in written.tolist()]
        for codes, scales, rows in ((*ours[:2], theirs[0]), (*ours[2:], theirs[1])):
            for pool, part in zip((codes, scales), int8_codes(rows[written]), strict=True):
                assert torch.equal(pool[written], part)
                assert (pool[others] == 99).all()


def test_float32_agrees_with_float64(impl):
    arguments, slots = problem(3, 4, 2, 32, 32, 32, torch.float64, "weights")
    narrow = [x.float() if isinstance(x, torch.Tensor) else x for x in arguments]
    exact, found = pools(3, 2, 32, 32, torch.float64), pools(3, 2, 32, 32, torch.float32)
    expected = exact_rotation(arguments, *exact, slots)
    torch.testing.assert_close(
        rotary_write(*narrow, False, *found, slots, impl=impl.option).double(), expected, rtol=1e-5, atol=1e-6
    )
    for ours, theirs in zip(found, exact):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_strided_inputs_and_pools(impl):
    """Queries, keys and values as parts of one projection; pools whose slots lie apart."""
    tokens, width = 6, 16
    arguments, slots = problem(tokens, 2, 1, width, width, width, torch.float32, "weights")
    joined = torch.cat([one[0] for one in arguments[:3]], -1)
    q, k, v = joined.split([2 * width, width, width], -1)
    apart = torch.full((3 * tokens, 4, width + 3), float("nan"))
    found = rotary_write(
        q, k, v, *arguments[3:], False, apart[:, 1:2, :width], apart[:, 2:3, :width], slots, impl=impl.option
    )
    theirs = pools(tokens, 1, width, width, torch.float32)
    assert torch.equal(found, one_after_the_other(arguments, False, *theirs, slots))
    assert same(apart[:, 1:2, :width], theirs[0])
    assert same(apart[:, 2:3, :width], theirs[1])
    assert apart[:, [0, 3]].isnan().all()
    assert apart[..., width:].isnan().all()


def test_what_is_not_finite_stays_in_its_row(impl):
    arguments, slots = problem(4, 2, 1, 16, 16, 16, torch.float32, "weights")
    clean = pools(4, 1, 16, 16, torch.float32)
    expected = rotary_write(*arguments, False, *clean, slots, impl=impl.option)
    arguments[0][0, 1], arguments[1][0, 2], arguments[2][0, 2] = float("nan"), float("inf"), float("nan")
    dirty = pools(4, 1, 16, 16, torch.float32)
    found = rotary_write(*arguments, False, *dirty, slots, impl=impl.option)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])
    others = [slot for at, slot in enumerate(slots.tolist()) if slot >= 0 and at != 2]
    assert torch.equal(dirty[0][others], clean[0][others])
    assert torch.equal(dirty[1][others], clean[1][others])


@pytest.mark.skipif(not has_native("rotary_write"), reason="no library")
def test_a_slot_outside_the_pools_is_an_error_before_anything_is_written():
    arguments, slots = problem(4, 2, 1, 16, 16, 16, torch.float32, "")
    keys, values = pools(4, 1, 16, 16, torch.float32)
    slots[3] = 12
    with pytest.raises(RuntimeError, match=r"slots\[3\] is 12; the pool has 12 slots"):
        rotary_write(*arguments, False, keys, values, slots, impl="cpu")
    assert keys.isnan().all()
    assert values.isnan().all()
    slots[3] = 0
    with pytest.raises(RuntimeError, match="the heads of 4 tokens"):
        rotary_write(arguments[0], arguments[1][:, :3], *arguments[2:], False, keys, values, slots, impl="cpu")
    with pytest.raises(RuntimeError, match="cos and sin must have shape"):
        rotary_write(*arguments[:-1], arguments[-1][:3], False, keys, values, slots, impl="cpu")


def test_operator_registration():
    arguments, slots = problem(4, 2, 1, 16, 16, 16, torch.float32, "weights")
    pooled = [torch.zeros(12, 1, 16) for _ in range(2)]
    torch.library.opcheck(torch.ops.toolkit.rotary_write.default, (*arguments, False, *pooled, slots))
    codes = [torch.zeros(12, 1, size, dtype=kind) for size, kind in ((16, torch.int8), (1, torch.float32)) * 2]
    torch.library.opcheck(torch.ops.toolkit.rotary_write_int8.default, (*arguments, False, *codes, slots))
