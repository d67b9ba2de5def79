"""Batches of sequences for the Triton attention launchers, and prefix trees, against dense float64 attention."""

import itertools
import math
import random

import torch

from tests.helpers.interpreter import poisoned
from tests.helpers.prefix_trees import ORACLES, error
from toolkit.ops.attention import modifiers  # noqa: F401  (registers the op)

attention, attention_backward = torch.ops.toolkit.attention, torch.ops.toolkit.attention_backward


def dense_sequence(q, keys, values, scale, window, softcap):
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
            dense_sequence(self.q[begin:end], keys, values, self.scale, window, softcap)
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


def run_trees(trees, scale=0.3, window=0, softcap=0.0, **options):
    with poisoned():
        out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, scale, window, softcap, **options)
        offsets, starts, lengths, tables, page = trees.plan
        tensors = trees.grad, trees.q, trees.k, trees.v, out, lse, offsets, starts, lengths
        rest = {"block_tables": tables, "block_size": page, "query_ranges": trees.query_ranges, **options}
        return out, lse, *attention_backward(*tensors, scale, window, softcap, **rest)


def check_trees(trees, window=0, softcap=0.0, modifier="", sinks=None, tolerance=1e-5):
    score, parameters = ORACLES.get(modifier, modifier)
    upcast = [x.double().requires_grad_() for x in (trees.q, trees.k, trees.v)]
    upcast += [] if sinks is None else [sinks.double().requires_grad_()]
    own = upcast[3] if sinks is not None else None
    expected, expected_lse = trees.dense(*upcast[:3], 0.3, window, softcap, own, score)
    wanted = torch.autograd.grad(expected, upcast, trees.grad.double())
    options = {"sinks": sinks, "modifier": modifier if modifier in ORACLES else "cubic", "parameters": parameters}
    out, lse, *grads = run_trees(trees, 0.3, window, softcap, **options)
    end = int(trees.query_offsets[-1])
    assert error(out, expected) < tolerance
    assert error(lse[:end], expected_lse[:end]) < 1e-5
    assert (lse[end:] == -math.inf).all()
    for name, actual, want in zip(("dq", "dk", "dv", "dsinks"), grads, wanted):
        assert error(actual, want) < 2 * tolerance, name
    for x in grads[1:3]:
        assert (x[~trees.held] == 0).all()
    if sinks is None:
        assert grads[3].shape == (0,)
