"""Batches of sequences, schedules and prefix trees for the tests of attention, and dense attention as their oracle."""

import math
import random

import torch

from tests.helpers.interpreter import poisoned
from tests.helpers.prefix_trees import ORACLES, error
from tests.helpers.rowwise import seeded
from toolkit.ops.attention import modifiers  # noqa: F401  (registers the op)

attention, attention_backward = torch.ops.toolkit.attention, torch.ops.toolkit.attention_backward


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
        k, v = (x.double().nan_to_num(0.0) for x in (self.k, self.v))
        plan = self.offsets, self.kv_offsets, self.kv_lengths
        out, lse = dense(self.q.double(), k, v, plan, self.scale, window, softcap)
        return out[: self.offsets[-1]], lse[: self.offsets[-1]]

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


def offsets(lengths):
    """[n] lengths to [n+1] offsets."""
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(lengths, padding=0):
    """The index tensors of sequences that attend to their own rows, and the number of rows."""
    starts = offsets(lengths)
    return (starts, starts[:-1].contiguous(), torch.tensor(lengths, dtype=torch.int64)), sum(lengths) + padding


def make(rows, hq, hkv, d, dv, dtype, seed=0, kv_rows=None):
    """q, k and v."""
    kv_rows = rows if kv_rows is None else kv_rows
    shapes = (rows, hq, d), (kv_rows, hkv, d), (kv_rows, hkv, dv)
    return [seeded(*s, dtype=dtype, seed=seed + at) for at, s in enumerate(shapes)]


def dense(q, k, v, plan, scale, window=0, softcap=0.0):
    """Per query and head, with Python loops over sequences: explicit softmax in the dtype given."""
    query_offsets, kv_offsets, kv_lengths = (x.tolist() for x in plan)
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    lse = torch.full(q.shape[:2], -math.inf, dtype=q.dtype)
    for s, (start, length) in enumerate(zip(kv_offsets, kv_lengths)):
        first, last = query_offsets[s], query_offsets[s + 1]
        for h in range(q.shape[1]):
            keys, values = k[start : start + length, h // group], v[start : start + length, h // group]
            x = q[first:last, h] @ keys.T * scale
            x = softcap * (x / softcap).tanh() if softcap else x
            position = torch.arange(last - first)[:, None] + length - (last - first)
            key = torch.arange(length)[None]
            hidden = (key > position) | (key <= position - window if window else torch.zeros_like(key > position))
            x = x.masked_fill(hidden, -math.inf)
            seen = ~hidden.all(-1)
            rows = torch.arange(first, last)[seen]
            out = out.index_put((rows, torch.tensor(h)), x[seen].softmax(-1) @ values)
            lse = lse.index_put((rows, torch.tensor(h)), x[seen].logsumexp(-1))
    return out, lse


def run_in_pages(q, k, v, lengths, chunks, block_size, window, softcap, rng, spare=3, forget=True):
    """Attention call by call: chunks[i] lists (sequence, queries) of call i. Unwritten slots hold NaN.

    forget: pages that are behind the window are no pages any more.
    """
    pages = [-(-n // block_size) for n in lengths]
    order = list(range(sum(pages) + spare))
    rng.shuffle(order)
    tables = torch.full((len(lengths), max(pages) + 1), -1)
    for s, count in enumerate(pages):
        tables[s, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
    slots = (sum(pages) + spare) * block_size
    pool_k = torch.full((slots, *k.shape[1:]), torch.nan, dtype=k.dtype)
    pool_v = torch.full((slots, *v.shape[1:]), torch.nan, dtype=v.dtype)
    starts, done = offsets(lengths).tolist(), [0] * len(lengths)
    out, lse = (
        torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=q.dtype),
        torch.full_like(q[..., 0], torch.nan),
    )
    for call in chunks:
        rows = []
        for s, count in call:
            own = torch.arange(done[s], done[s] + count)
            slot = tables[s, own // block_size] * block_size + own % block_size
            pool_k[slot], pool_v[slot] = k[starts[s] + own], v[starts[s] + own]
            done[s] += count
            rows.append(starts[s] + own)
        batch = [s for s, _ in call]
        taken = tables[batch].clone()
        for i, s in enumerate(batch):  # pages behind the window may be gone
            oldest = done[s] - call[i][1] - window + 1
            if forget and window and oldest > 0:
                taken[i, : oldest // block_size] = -7
        index = torch.cat(rows)
        layout = (
            offsets([count for _, count in call]),
            torch.zeros(len(call), dtype=torch.int64),
            torch.tensor([done[s] for s in batch]),
        )
        out[index], lse[index] = attention(q[index], pool_k, pool_v, *layout, taken, block_size, 0.2, window, softcap)
    assert done == lengths
    return out, lse


def random_chunks(lengths, largest, rng):
    """Random calls: some sequences, each with a random number of its next queries."""
    left, calls = list(lengths), []
    while any(left):
        alive = [s for s, n in enumerate(left) if n]
        call = []
        for s in rng.sample(alive, rng.randint(1, len(alive))):
            count = min(left[s], rng.randint(1, largest))
            left[s] -= count
            call.append((s, count))
        calls.append(call)
    return calls


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
