"""Attention on a CUDA device at sizes that the interpreter is too slow for: against float64, and the bits of a row."""

import math
import random
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest norm-wise relative error against float64.
ERROR = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def relative(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def dense(q, k, v, lengths, queries, window=0, softcap=0.0):
    """Packed sequences in float64; ``lengths`` keys each, of which the last ``queries`` ask."""
    parts, key_at, query_at = [], 0, 0
    for length, count in zip(lengths, queries):
        rows = slice(key_at, key_at + length)
        position = length - count + torch.arange(count, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None, :]
        hidden = (key > position) | ((key <= position - window) if window > 0 else False)
        keys, values = (x[rows].double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("nhd,khd->hnk", q[query_at : query_at + count].double(), keys) * q.shape[-1] ** -0.5
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        parts.append(torch.einsum("hnk,khv->nhv", scores.masked_fill(hidden, -math.inf).softmax(-1), values))
        key_at, query_at = key_at + length, query_at + count
    return torch.cat(parts)


def offsets(counts):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], device="cuda")


def inputs(dtype, lengths, queries, heads, kv_heads, d, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda").to(dtype)

    rows = sum(lengths)
    return normal(sum(queries), heads, d), normal(rows, kv_heads, d), normal(rows, kv_heads, d)


def contiguous(q, k, v, lengths, queries, window=0, softcap=0.0):
    from toolkit.ops.attention.triton import attention

    kv_lengths = torch.tensor(lengths, device="cuda")
    starts, scale = offsets(lengths)[:-1], q.shape[-1] ** -0.5
    return attention(q, k, v, offsets(queries), starts, kv_lengths, None, 0, scale, window, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "window", "softcap"),
    [
        (8, 2, 128, 0, 0.0),
        (8, 8, 64, 100, 0.0),
        (6, 2, 96, 0, 30.0),
        (4, 1, 256, 0, 0.0),
        (7, 1, 40, 33, 5.0),
    ],
)
def test_attention_matches_float64(dtype, heads, kv_heads, d, window, softcap):
    lengths, queries = [300, 1, 517, 64, 900], [300, 1, 40, 1, 1]
    q, k, v = inputs(dtype, lengths, queries, heads, kv_heads, d)
    out, _ = contiguous(q, k, v, lengths, queries, window, softcap)
    assert relative(out, dense(q, k, v, lengths, queries, window, softcap)) < ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_chunks_and_neighbours_keep_the_bits(dtype):
    from toolkit.ops.attention.triton import attention

    length, heads, kv_heads, d, page = 333, 8, 2, 128, 16
    q, k, v = inputs(dtype, [length], [length], heads, kv_heads, d)
    whole, whole_lse = contiguous(q, k, v, [length], [length])
    pages = -(-length // page)
    order = torch.randperm(pages + 7, generator=torch.Generator().manual_seed(5))[:pages].cuda()
    slots = (order[:, None] * page + torch.arange(page, device="cuda")).flatten()[:length]
    pools = [torch.full(((pages + 7) * page, kv_heads, d), math.nan, device="cuda", dtype=dtype) for _ in range(2)]
    pools[0][slots], pools[1][slots] = k, v
    rng = random.Random(1)
    for trial in range(20):
        begin = rng.randrange(0, length)
        end = length if trial == 0 else min(length, begin + rng.choice([1, 1, 2, 17, 64, 200]))
        other = rng.randrange(0, 70)
        stray = torch.randn(other, heads, d, device="cuda").to(dtype)
        tables = torch.stack([order, order])  # the neighbour reads the same pages
        for before in (0, other):
            packed = torch.cat([stray[:before], q[begin:end], stray[before:]])
            counts = [before, end - begin, other - before]
            kv_lengths = torch.tensor([max(before, 1), end, max(other - before, 1)], device="cuda")
            out, lse = attention(packed, *pools, offsets(counts), kv_lengths * 0, kv_lengths,
                                 torch.cat([tables, tables[:1]]), page, d**-0.5, 0, 0.0)  # fmt: skip
            assert torch.equal(out[before : before + end - begin], whole[begin:end])
            assert torch.equal(lse[before : before + end - begin], whole_lse[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d", "window"), [(8, 2, 128, 0), (4, 2, 64, 2500), (16, 1, 576, 0)])
def test_splits_keep_the_bits(dtype, heads, kv_heads, d, window):
    """Many queries (one program takes the splits in turn), chunks and decode (a program a split), and a context that
    alone is within one split (none) but has a longer neighbour: float64's values, and one row's bits."""
    from toolkit.ops.attention import tiles
    from toolkit.ops.triton_devices import architecture

    split = tiles.SPLITS.find(architecture(torch.device("cuda")), dtype, d)
    count = tiles.APART_ROWS + 88
    length = 2 * split + 300
    q, k, v = inputs(dtype, [length], [count], heads, kv_heads, d)
    v = v[..., :512]
    whole, whole_lse = contiguous(q, k, v, [length], [count], window)
    assert relative(whole, dense(q, k, v, [length], [count], window)) < ERROR[dtype]
    for begin, end in ((0, 1), (299, 300), (300, 301), (count - 301, count - 299), (7, 150), (count - 1, count)):
        keys = length - count + end
        got, lse = contiguous(q[begin:end], k[:keys], v[:keys], [keys], [end - begin], window)
        assert torch.equal(got, whole[begin:end])
        assert torch.equal(lse, whole_lse[begin:end])
    short = split - 5
    alone, alone_lse = contiguous(q[:9], k[:short], v[:short], [short], [9], window)
    for others in (3, count):
        packed = torch.cat([q[:9], q[:others]])
        keys, values = torch.cat([k[:short], k]), torch.cat([v[:short], v])
        got, lse = contiguous(packed, keys, values, [short, length], [9, others], window)
        assert torch.equal(got[:9], alone)
        assert torch.equal(lse[:9], alone_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "window", "softcap"), [(128, 0, 0.0), (64, 50, 0.0), (96, 0, 20.0), (256, 0, 0.0)])
def test_attention_backward_matches_float64(dtype, d, window, softcap):
    from toolkit.ops.attention.triton_backward import attention_backward

    lengths, queries = [200, 1, 130], [200, 1, 50]
    q, k, v = inputs(dtype, lengths, queries, 6, 2, d)
    grad = torch.randn(q.shape, device="cuda").to(dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    dense(*exact, lengths, queries, window, softcap).backward(grad.double())
    out, lse = contiguous(q, k, v, lengths, queries, window, softcap)
    indices = (offsets(queries), offsets(lengths)[:-1], torch.tensor(lengths, device="cuda"))
    arguments = (grad, q, k, v, out, lse, *indices, d**-0.5, window, softcap)
    got, again = attention_backward(*arguments), attention_backward(*arguments)
    for value, repeat, expected in zip(got, again, exact):
        assert relative(value, expected.grad) < 2 * ERROR[dtype]
        assert torch.equal(value, repeat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_tile_height(dtype, record_property):
    """Not a promise but a measurement: printed and kept in the report. Every height must be right, though.

    What tiles do to the bits of a product, ``benchmarks.gpu.tile_invariance`` measures.
    """
    from toolkit.ops.attention import tiles
    from toolkit.ops.tiles import TileTable, for_any_size
    from toolkit.ops.triton_devices import architecture

    lengths = queries = [257]
    q, k, v = inputs(dtype, lengths, queries, 4, 4, 64)
    exact = dense(q, k, v, lengths, queries)
    arch = architecture(q.device)
    base = tiles.FORWARD.find(arch, dtype, 64)
    outs = {}
    for rows in (16, 32, 64, 128):
        table = TileTable("attention", for_any_size({arch: {dtype.itemsize: replace(base, rows=rows)}}))
        with mock.patch.object(tiles, "FORWARD", table):
            outs[rows], _ = contiguous(q, k, v, lengths, queries)
        assert relative(outs[rows], exact) < ERROR[dtype]
    differ = {rows: int((out != outs[64]).sum()) for rows, out in outs.items()}
    print(f"\n{dtype}: elements that differ from 64 rows: {differ} of {exact.numel()}")
    record_property("attention_heights", str(differ))
