"""Attention over wide heads (MLA's latent) and over contexts of several splits, on the CPU."""

import itertools
import math

import pytest
import torch

from tests.helpers.prefix_trees import Forest, Node, error
from toolkit.ops.attention import attention, attention_backward
from toolkit.ops.registry import has_native

needs_native = pytest.mark.skipif(not has_native("attention"), reason="the native CPU library is not built")
IMPLS = ["reference", pytest.param("cpu", marks=needs_native)]
SPLIT = 4096  # keys, in toolkit/ops/attention/problem.h


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [3, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_latent_heads(heads, dtype, impl):
    """Keys of 576, of which the first 512 are the values; every query head shares them."""
    nodes = [Node(-1, 6, 70), Node(0, 5, 0), Node(0, 2, 0)] if heads > 64 else [Node(-1, 60, 10), Node(0, 50, 0)]
    forest = Forest(1, heads=heads, kv_heads=1, d=576, v_dim=512, nodes=nodes, dtype=dtype)
    leaves = [x.detach().requires_grad_() for x in (forest.q, forest.k)]
    out, lse = attention(*leaves, leaves[1][..., :512], *forest.plan, 0.05, impl=impl)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected, expected_lse = forest.dense(*wide, wide[1][..., :512], 0.05)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    end = int(forest.query_offsets[-1])
    assert error(out, expected) < tolerance
    assert error(lse[:end], expected_lse[:end]) < tolerance
    wanted = torch.autograd.grad(expected, wide, forest.grad.double())
    for actual, want in zip(torch.autograd.grad(out, leaves, forest.grad), wanted):
        assert error(actual, want) < 10 * tolerance
    # Apart, the gradients of keys and of values are those of a copy.
    plan, tables, page = forest.plan[:3], *forest.plan[3:]
    tensors = forest.grad, leaves[0], leaves[1], leaves[1][..., :512]
    grads = attention_backward(
        *(x.detach() for x in (*tensors, out, lse)), *plan, 0.05, 0, 0.0, tables, page, impl=impl
    )
    copied = [x.detach() for x in (*tensors[:3], tensors[3].clone(), out, lse)]
    for a, b in zip(grads, attention_backward(*copied, *plan, 0.05, 0, 0.0, tables, page, impl=impl)):
        assert torch.equal(a, b)


@needs_native
def test_latent_bits_do_not_depend_on_chunks_or_threads(threads):
    q, k = torch.randn(80, 16, 576), torch.randn(80, 1, 576)
    plan = torch.tensor([0, 80]), torch.tensor([0]), torch.tensor([80])
    expected = attention(q, k, k[..., :512], *plan, scale=0.05)
    for count, cuts in ((1, [0, 1, 2, 40, 80]), (2, [0, 64, 79, 80])):
        threads(count)
        for begin, end in itertools.pairwise(cuts):
            part = torch.tensor([0, end - begin]), torch.tensor([0]), torch.tensor([end])
            got = attention(q[begin:end], k[:end], k[:end, :, :512], *part, scale=0.05)
            assert torch.equal(got[0], expected[0][begin:end])
            assert torch.equal(got[1], expected[1][begin:end])


def long_sequence(heads, kv_heads, d, length, queries, dtype=torch.float32):
    g = torch.Generator().manual_seed(length)
    shapes = (queries, heads, d), (length, kv_heads, d), (length, kv_heads, d)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def dense(q, k, v, scale, window=0, sinks=None):
    """The queries are the last of the keys; float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    position = torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
    key = torch.arange(k.shape[0])[None]
    hidden = (key > position) | (key <= position - window if window else False)
    x = torch.einsum("qhd,khd->hqk", q, k).mul(scale).masked_fill(hidden, -math.inf)
    if sinks is not None:
        x = torch.cat([x, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)], -1)
    return torch.einsum("hqk,khd->qhd", x.softmax(-1)[..., : k.shape[0]], v), x.logsumexp(-1).T


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [0, 3000, 9000])
def test_contexts_of_several_splits(impl, window):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        q, k, v = long_sequence(2, 1, 16, 2 * SPLIT + 77, 40, dtype)
        plan = torch.tensor([0, 40]), torch.tensor([0]), torch.tensor([k.shape[0]])
        sinks = torch.tensor([0.5, 9.0], dtype=dtype)
        out, lse = attention(q, k, v, *plan, None, 0, 0.25, window, 0.0, sinks, impl=impl)
        expected, expected_lse = dense(q, k, v, 0.25, window, sinks)
        assert error(out, expected) < tolerance
        assert error(lse, expected_lse) < tolerance


@needs_native
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(2, 1, 0), (6, 2, 0), (2, 1, 5000), (2, 2, 700)])
def test_split_bits_are_those_of_any_schedule(heads, kv_heads, window, threads):
    """A row alone by many threads, in a chunk, and in pages among short sequences: the same bits."""
    length, queries = 2 * SPLIT + 70, 75
    q, k, v = long_sequence(heads, kv_heads, 16, length, queries)
    sinks = torch.randn(heads)
    options = {"scale": 0.2, "window": window, "sinks": sinks}
    threads(1)
    expected = attention(q, k, v, torch.tensor([0, queries]), torch.tensor([0]), torch.tensor([length]), **options)
    page = 16
    pages = -(-length // page)
    order = torch.randperm(pages + 4, generator=torch.Generator().manual_seed(0))
    pool = [torch.full(((pages + 4) * page, kv_heads, 16), math.nan) for _ in range(2)]
    for x, whole in zip(pool, (k, v)):
        for i in range(pages):
            part = whole[i * page : (i + 1) * page]
            x[order[i] * page : order[i] * page + len(part)] = part
    first = length - queries
    for count, i in ((1, 0), (2, 4), (8, 5), (5, 6), (3, 70), (4, 74)):
        threads(count)
        one = torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([first + i + 1])
        for tensors, tables in (((k, v), ()), (pool, (order[None, :pages].contiguous(), page))):
            got = attention(q[i : i + 1], *tensors, *one, *tables, **options)
            assert torch.equal(got[0][0], expected[0][i])
            assert torch.equal(got[1][0], expected[1][i])
    # With a short sequence, so that there are more tasks; and a few rows as a chunk.
    threads(16)
    two = torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.tensor([first + 9, 5])
    got = attention(torch.cat([q[8:9], q[:1]]), k, v, *two, **options)
    assert torch.equal(got[0][0], expected[0][8])
    few = torch.tensor([0, 5]), torch.tensor([0]), torch.tensor([first + 12])
    assert torch.equal(attention(q[7:12], k, v, *few, **options)[0], expected[0][7:12])


@needs_native
def test_a_context_of_one_split_is_summed_as_ever():
    """The first row past the split's end differs from one sum over all keys in rounding alone."""
    q, k, v = long_sequence(1, 1, 8, SPLIT + 1, 2)
    plan = torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([SPLIT + 1])
    out, _ = attention(q, k, v, *plan, scale=0.3)
    assert error(out, dense(q, k, v, 0.3)[0]) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_several_splits(impl):
    q, k, v = long_sequence(2, 1, 8, SPLIT + 300, 3, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([SPLIT + 300])
    out, _ = attention(*leaves, *plan, scale=0.3, impl=impl)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(dense(*leaves, 0.3)[0], leaves, grad)
    for actual, want in zip(torch.autograd.grad(out, leaves, grad), wanted):
        assert error(actual, want) < 1e-11
