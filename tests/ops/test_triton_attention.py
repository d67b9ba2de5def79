"""Triton attention in Triton's interpreter, on CPU tensors."""

import itertools
import math
import random

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers.interpreter import row_by_row
from toolkit.errors import ToolkitError
from toolkit.ops.attention.triton import attention


def dense(q, keys, values, scale, window, softcap):
    """One sequence in fp64 with a full score matrix: its queries are the last of the keys."""
    n, heads, _ = q.shape
    length, kv_heads, _ = keys.shape
    position = length - n + torch.arange(n)[:, None]
    key = torch.arange(length)[None, :]
    hidden = (key > position) | ((key <= position - window) if window > 0 else False)
    keys, values = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    scores = torch.einsum("nhd,khd->hnk", q.double(), keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("hnk,khv->nhv", scores.softmax(-1), values), scores.logsumexp(-1).T


class Batch:
    """Random sequences with past keys, laid out contiguously and in pages, both poisoned where unused."""

    def __init__(self, seed, lengths, heads, kv_heads, d, v_dim=None, page=16, dtype=torch.float32, padding=0):
        g = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        v_dim = v_dim or d
        self.queries = [n for n, _ in lengths]
        self.kv = [past + n for n, past in lengths]
        self.offsets = torch.tensor([0, *torch.tensor(self.queries).cumsum(0).tolist()])
        self.q = torch.randn(int(self.offsets[-1]) + padding, heads, d, generator=g).to(dtype)
        self.keys = [torch.randn(n, kv_heads, d, generator=g).to(dtype) for n in self.kv]
        self.values = [torch.randn(n, kv_heads, v_dim, generator=g).to(dtype) for n in self.kv]
        gap = 3  # rows between sequences that nobody may read
        self.kv_offsets = torch.tensor([sum(self.kv[:i]) + gap * (i + 1) for i in range(len(self.kv))])
        self.kv_lengths = torch.tensor(self.kv)
        rows = sum(self.kv) + gap * (len(self.kv) + 1)
        self.k = torch.full((rows, kv_heads, d), math.nan, dtype=dtype)
        self.v = torch.full((rows, kv_heads, v_dim), math.nan, dtype=dtype)
        pages = [-(-n // page) for n in self.kv]
        free = list(range(sum(pages) + 5))
        rng.shuffle(free)
        self.page = page
        self.tables = torch.full((len(self.kv), max(pages) + 2), 10**9)
        self.k_pool = torch.full((len(free) * page, kv_heads, d), math.nan, dtype=dtype)
        self.v_pool = torch.full((len(free) * page, kv_heads, v_dim), math.nan, dtype=dtype)
        for s, n in enumerate(self.kv):
            at = int(self.kv_offsets[s])
            self.k[at : at + n], self.v[at : at + n] = self.keys[s], self.values[s]
            for p in range(pages[s]):
                self.tables[s, p] = free.pop()
            slots = [int(self.tables[s, j // page]) * page + j % page for j in range(n)]
            self.k_pool[slots], self.v_pool[slots] = self.keys[s], self.values[s]
        self.scale = d**-0.5

    def contiguous(self, window=0, softcap=0.0):
        return attention(self.q, self.k, self.v, self.offsets, self.kv_offsets, self.kv_lengths,
                         None, 0, self.scale, window, softcap)  # fmt: skip

    def paged(self, window=0, softcap=0.0):
        return attention(self.q, self.k_pool, self.v_pool, self.offsets, self.kv_offsets, self.kv_lengths,
                         self.tables, self.page, self.scale, window, softcap)  # fmt: skip

    def expected(self, window=0, softcap=0.0):
        parts = [
            dense(self.q[begin:end], keys, values, self.scale, window, softcap)
            for (begin, end), keys, values in zip(itertools.pairwise(self.offsets), self.keys, self.values)
        ]
        return torch.cat([o for o, _ in parts]), torch.cat([l for _, l in parts])

    def check(self, tolerance, **options):
        out, lse = self.expected(**options)
        end = int(self.offsets[-1])
        results = [self.contiguous(**options), self.paged(**options)]
        for got, got_lse in results:
            assert got.dtype == self.q.dtype
            torch.testing.assert_close(got[:end].double(), out, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(got_lse[:end].double(), lse, rtol=1e-5, atol=1e-5)
            assert (got[end:] == 0).all()
            assert (got_lse[end:] == -math.inf).all()
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "v_dim", "page"),
    [
        (1, 1, 16, 16, 16),
        (4, 2, 20, 20, 7),
        (7, 1, 64, 40, 3),
        (34, 1, 16, 5, 4),
    ],
)
def test_matches_dense_oracle(heads, kv_heads, d, v_dim, page):
    lengths = [(5, 0), (1, 20), (17, 3), (0, 4)] if heads < 10 else [(2, 17), (0, 1), (1, 0)]
    Batch(1, lengths, heads, kv_heads, d, v_dim, page, padding=3).check(2e-5)


@pytest.mark.parametrize("window", [1, 5, 33])
def test_window(window):
    Batch(2, [(20, 0), (3, 40), (1, 16)], 2, 1, 16).check(2e-5, window=window)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap):
    Batch(3, [(19, 2), (1, 20)], 4, 2, 16).check(2e-5, softcap=softcap, window=11)


def test_half_precision():
    Batch(4, [(19, 2), (1, 20)], 4, 2, 32, dtype=torch.float16).check(2**-9)


def test_extreme_scores():
    batch = Batch(5, [(20, 5)], 2, 2, 16)
    batch.q *= 1e3
    batch.check(1e-4)


def test_no_tokens_and_only_padding():
    empty = Batch(6, [(0, 3)], 2, 2, 16)
    out, lse = empty.paged()
    assert out.shape == (0, 2, 16)
    assert lse.shape == (0, 2)
    Batch(6, [(0, 3), (0, 1)], 2, 2, 16, padding=5).check(1e-5)


def test_strided_inputs():
    batch = Batch(7, [(9, 4)], 4, 2, 16)
    want = batch.contiguous()
    wide = torch.cat([batch.k, batch.v], -1)  # k and v as views of one fused tensor
    batch.k, batch.v = wide[..., :16], wide[..., 16:]
    batch.q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    got = batch.contiguous()
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (7, 20.0)])
def test_chunks_decode_and_neighbours_keep_the_bits(window, softcap, monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    whole = Batch(8, [(23, 0)], 6, 2, 24)
    out, lse = whole.contiguous(window, softcap)
    rng = random.Random(9)
    for trial in range(1 + (window == 0)):
        cuts = sorted({0, 23, *rng.sample(range(1, 23), 3), 21, 22})
        for begin, end in itertools.pairwise(cuts):
            before, after = rng.randrange(0, 4), rng.randrange(0, 4)
            noise = Batch(100 + trial, [(before, 2), (after, 5)], 6, 2, 24)
            rows = noise.k.shape[0]
            q = torch.cat([noise.q[:before], whole.q[begin:end], noise.q[before:]])
            got = attention(
                q, torch.cat([noise.k, whole.k]), torch.cat([noise.v, whole.v]),
                torch.tensor([0, before, before + end - begin, before + end - begin + after]),
                torch.tensor([noise.kv_offsets[0], rows + whole.kv_offsets[0], noise.kv_offsets[1]]),
                torch.tensor([noise.kv[0], end, noise.kv[1]]), None, 0, whole.scale, window, softcap,
            )  # fmt: skip
            assert torch.equal(got[0][before : before + end - begin], out[begin:end])
            assert torch.equal(got[1][before : before + end - begin], lse[begin:end])


def test_bad_input_is_one_sentence():
    batch = Batch(10, [(2, 0)], 3, 1, 16)
    with pytest.raises(ToolkitError, match="dtypes"):
        attention(
            batch.q.half(),
            batch.k,
            batch.v,
            batch.offsets,
            batch.kv_offsets,
            batch.kv_lengths,
            None,
            0,
            1.0,
            0,
            0.0,
        )
    with pytest.raises(ToolkitError, match="interpreter takes"):
        Batch(10, [(2, 0)], 3, 1, 16, dtype=torch.bfloat16).contiguous()
    batch = Batch(10, [(2, 0)], 3, 1, 600, 64)
    with pytest.raises(ToolkitError, match="head_dim must be <= 576 in the Triton kernels of attention, got 600"):
        batch.contiguous()
    with pytest.raises(ToolkitError, match="multiple of Hkv"):
        attention(batch.q, batch.k.repeat(1, 2, 1), batch.v.repeat(1, 2, 1), batch.offsets, batch.kv_offsets,
                  batch.kv_lengths, None, 0, 1.0, 0, 0.0)  # fmt: skip
