"""Attention over pages in eight bits: bit for bit attention over the values that codes and scales stand for."""

import random

import pytest
import torch

from tests.helpers.attention import Batch
from tests.helpers.implementations import NATIVE, REFERENCE, SMALL, TRITON, impl_and_dtype, implementations
from tests.helpers.rowwise import THREADS, seeded, threads
from tests.ops.test_attention_spans import of_rows, picture_spans
from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention
from toolkit.ops.attention_int8 import attention_int8
from toolkit.ops.int8_rows import int8_codes, int8_values
from toolkit.ops.registry import has_native

OPTIONS = [
    {},
    {"window": 11, "softcap": 0.5},
    {"sinks": True, "window": 1},
    {"modifier": "alibi"},
    {"modifier": "chunked", "sinks": True},
    {"spans": True, "window": 7},
]
SHAPES = [(4, 2, 20, 20, 7), (7, 1, 64, 40, 3), (1, 1, 16, 16, 16), (34, 1, 16, 5, 4), (6, 2, 64, 64, 16)]


def in_eight_bits(batch: Batch) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The pools of a batch as (codes, codes, scales, scales), and as the values of those; unused slots are NaN."""
    pairs = [int8_codes(pool) for pool in (batch.k_pool, batch.v_pool)]
    values = tuple(int8_values(*pair, batch.q.dtype) for pair in pairs)
    assert all(of.isnan().any() for of in values)
    (k, key_scales), (v, value_scales) = pairs
    return (k, v, key_scales, value_scales), values


def chosen(batch: Batch, given: dict, seed: int = 5) -> dict:
    heads = batch.q.shape[1]
    options = dict(given)
    if options.pop("sinks", False):
        options["sinks"] = seeded(heads, dtype=batch.q.dtype, seed=seed)
    if "modifier" in options:
        sizes = torch.arange(1, heads + 1)[:, None]
        options["parameters"] = sizes * 5.0 if options["modifier"] == "chunked" else 0.5**sizes
    if options.pop("spans", False):
        rng, rows = random.Random(seed), []
        for count, length in zip(batch.queries, batch.kv):
            rows.append(of_rows(picture_spans(length, rng, 6), length - count, length))
        padding = len(batch.q) - int(batch.offsets[-1])
        options["spans"] = torch.cat([*rows, torch.zeros(padding, 2, dtype=torch.int64)])
    return options


def both(batch: Batch, impl, given: dict) -> tuple:
    pools, values = in_eight_bits(batch)
    options = chosen(batch, given)
    plan = batch.kv_lengths, batch.tables, batch.page, 0.3
    found = attention_int8(batch.q, *pools, batch.offsets, *plan, **options, impl=impl.option)
    return found, attention(batch.q, *values, batch.offsets, batch.kv_offsets, *plan, **options, impl=impl.option)


@impl_and_dtype()
@pytest.mark.parametrize("at", range(len(OPTIONS)))
def test_bits_are_those_of_attention_over_the_values(impl, dtype, at):
    small = SMALL and impl is TRITON
    for shape in SHAPES[at % 2 : at % 2 + 1] if small else SHAPES:
        lengths = [(2, 7), (0, 3), (1, 9)] if small else [(5, 0), (1, 70), (17, 3), (0, 4), (1, 200)]
        heads, kv_heads, d, v_dim, page = shape
        batch = Batch(at, lengths, heads, kv_heads, d, v_dim, page, dtype=dtype, padding=3)
        (out, lse), (expected, expected_lse) = both(batch, impl, OPTIONS[at])
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        assert out[: batch.offsets[-1]].isfinite().all()


@implementations(REFERENCE, NATIVE)
def test_splits_of_long_sequences(impl):
    """Sequences of more keys than a split, by several threads that take a split each."""
    batch = Batch(3, [(1, 9000), (1, 4096)], 4, 2, 16, 16, 16)
    expected = None
    for count in THREADS:
        with threads(count):
            found, plain = both(batch, impl, {})
        assert torch.equal(found[0], plain[0])
        assert expected is None or torch.equal(found[0], expected)
        expected = found[0]


def test_codes_against_float64(impl):
    """A row's error is that of its codes: against dense attention of the exact keys and values."""
    batch = Batch(2, [(3, 20), (1, 5)], 4, 2, 32, 32, 8, dtype=impl.dtypes[0])
    pools, _ = in_eight_bits(batch)
    plan = batch.kv_lengths, batch.tables, batch.page, batch.scale
    out, _ = attention_int8(batch.q, *pools, batch.offsets, *plan, impl=impl.option)
    exact, _ = batch.expected()
    assert 0 < (out - exact).abs().max() < 0.05


@implementations(REFERENCE, NATIVE)
def test_strided_pools(impl):
    batch = Batch(4, [(2, 30), (1, 3)], 4, 2, 16, 16, 8)
    pools, _ = in_eight_bits(batch)
    plan = batch.offsets, batch.kv_lengths, batch.tables, batch.page, 0.3
    expected = attention_int8(batch.q, *pools, *plan, impl=impl.option)
    apart = [torch.stack([one, one * 0 - 1], 1)[:, 0] for one in pools]
    for one, other in zip(attention_int8(batch.q, *apart, *plan, impl=impl.option), expected):
        assert torch.equal(one, other)


def test_what_is_refused(impl):
    batch = Batch(4, [(2, 30)], 4, 2, 16, 16, 8)
    pools, values = in_eight_bits(batch)
    plan = batch.offsets, batch.kv_lengths, batch.tables, batch.page
    with pytest.raises(ToolkitError, match="attention_int8 has no gradient"):
        attention_int8(batch.q.requires_grad_(), *pools, *plan, impl=impl.option)
    with pytest.raises(ToolkitError, match=r"sinks must have shape \[4\]"):
        attention_int8(batch.q.detach(), *pools, *plan, sinks=torch.zeros(3), impl=impl.option)
    if impl is NATIVE:
        with pytest.raises(RuntimeError, match="codes must be int8"):
            attention_int8(batch.q.detach(), *values, *pools[2:], *plan)
    with pytest.raises((ToolkitError, RuntimeError, IndexError)):
        attention_int8(batch.q.detach(), *pools[:2], pools[2][:3], pools[3], *plan)


@pytest.mark.skipif(not has_native("attention_int8"), reason="the native CPU library is not built")
def test_operator_registration():
    batch = Batch(4, [(2, 9), (1, 3)], 4, 2, 16, 16, 8)
    pools, _ = in_eight_bits(batch)
    arguments = (batch.q, *pools, batch.offsets, batch.kv_lengths, batch.tables, batch.page, 0.3, 0, 0.0)
    torch.library.opcheck(torch.ops.toolkit.attention_int8.default, arguments)
