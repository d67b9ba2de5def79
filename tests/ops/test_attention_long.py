"""Attention over large heads (MLA's latent) and over contexts of several splits, on the CPU."""

import itertools
import math
import random

import pytest
import torch

from tests.helpers.attention import Batch, check_trees, run_trees
from tests.helpers.implementations import NATIVE, REFERENCE, implementations, only_interpreter, parameter
from tests.helpers.interpreter import poisoned
from tests.helpers.prefix_trees import Node, PrefixTrees, error
from toolkit.ops.attention import attention, attention_backward, modifiers, tiles
from toolkit.ops.attention.modifiers import find
from toolkit.ops.registry import has_native

needs_native = pytest.mark.skipif(not has_native("attention"), reason="the native CPU library is not built")
cpu_kernels = implementations(REFERENCE, NATIVE)  # the interpreter is too slow for contexts of this length
SPLIT = 4096  # keys, in toolkit/ops/attention/problem.h


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("impl", "dtype", "heads"),
    [
        parameter(one, dtype, heads, marks=[pytest.mark.sweep] if one is REFERENCE and heads > 3 else [])
        for one in (REFERENCE, NATIVE)
        for dtype in (torch.float64, torch.float32)
        for heads in (3, 128)
    ],
    indirect=["impl"],
)
def test_latent_heads(heads, dtype, impl):
    """Keys of 576, of which the first 512 are the values; every query head shares them."""
    nodes = [Node(-1, 6, 70), Node(0, 5, 0), Node(0, 2, 0)] if heads > 64 else [Node(-1, 60, 10), Node(0, 50, 0)]
    trees = PrefixTrees(1, heads=heads, kv_heads=1, d=576, v_dim=512, nodes=nodes, dtype=dtype)
    leaves = [x.detach().requires_grad_() for x in (trees.q, trees.k)]
    out, lse = attention(*leaves, leaves[1][..., :512], *trees.plan, 0.05)
    upcast = [x.detach().double().requires_grad_() for x in leaves]
    expected, expected_lse = trees.dense(*upcast, upcast[1][..., :512], 0.05)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    end = int(trees.query_offsets[-1])
    assert error(out, expected) < tolerance
    assert error(lse[:end], expected_lse[:end]) < tolerance
    wanted = torch.autograd.grad(expected, upcast, trees.grad.double())
    for actual, want in zip(torch.autograd.grad(out, leaves, trees.grad), wanted):
        assert error(actual, want) < 10 * tolerance
    # Apart, the gradients of keys and of values are those of a copy.
    plan, tables, page = trees.plan[:3], *trees.plan[3:]
    tensors = trees.grad, leaves[0], leaves[1], leaves[1][..., :512]
    grads = attention_backward(*(x.detach() for x in (*tensors, out, lse)), *plan, 0.05, 0, 0.0, tables, page)
    copied = [x.detach() for x in (*tensors[:3], tensors[3].clone(), out, lse)]
    for a, b in zip(grads, attention_backward(*copied, *plan, 0.05, 0, 0.0, tables, page)):
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


@cpu_kernels
@pytest.mark.parametrize("window", [0, 3000, 9000])
def test_contexts_of_several_splits(impl, window):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        q, k, v = long_sequence(2, 1, 16, 2 * SPLIT + 77, 40, dtype)
        plan = torch.tensor([0, 40]), torch.tensor([0]), torch.tensor([k.shape[0]])
        sinks = torch.tensor([0.5, 9.0], dtype=dtype)
        out, lse = attention(q, k, v, *plan, None, 0, 0.25, window, 0.0, sinks)
        expected, expected_lse = dense(q, k, v, 0.25, window, sinks)
        assert error(out, expected) < tolerance
        assert error(lse, expected_lse) < tolerance


@needs_native
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(2, 1, 0), (6, 2, 0), (2, 1, 5000), (2, 2, 700)])
def test_split_bits_are_those_of_any_schedule(heads, kv_heads, window, threads):
    """A row alone by many threads, in a chunk, and in pages among short sequences: bitwise identical results."""
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


@cpu_kernels
def test_gradients_of_several_splits(impl):
    q, k, v = long_sequence(2, 1, 8, SPLIT + 300, 3, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([SPLIT + 300])
    out, _ = attention(*leaves, *plan, scale=0.3)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(dense(*leaves, 0.3)[0], leaves, grad)
    for actual, want in zip(torch.autograd.grad(out, leaves, grad), wanted):
        assert error(actual, want) < 1e-11


# The Triton kernels: their splits are shorter in the interpreter.
TRITON_SPLIT = tiles.SPLITS.find("interpreter", torch.float32, 64)


@pytest.fixture
def way(request, monkeypatch):
    """Every split as a separate program, one program for all of a row's splits, and that some row tiles at a time."""
    chosen = getattr(request, "param", "apart")
    if chosen != "apart":
        monkeypatch.setattr(tiles, "APART_ROWS", 0)
    if chosen == "in several launches":
        monkeypatch.setattr(tiles, "WORKSPACE", 1)
    return chosen


@only_interpreter
@pytest.mark.usefixtures("impl", "way")
@pytest.mark.parametrize(
    ("way", "heads", "kv_heads", "d", "v_dim", "page", "options"),
    [
        ("apart", 4, 2, 20, 20, 7, {}),
        pytest.param("in turn", 4, 2, 20, 20, 7, {}, marks=pytest.mark.sweep),
        pytest.param("apart", 2, 1, 64, 40, 4, {"window": 41, "softcap": 2.0}, marks=pytest.mark.sweep),
        ("in several launches", 2, 1, 64, 40, 4, {"window": 41, "softcap": 2.0}),
        ("in turn", 17, 1, 16, 16, 16, {}),
    ],
    indirect=["way"],
)
def test_matches_dense_oracle(way, heads, kv_heads, d, v_dim, page, options):
    """Lengths on both sides of a split's end, a chunk across it, an empty sequence, and padding."""
    lengths = [
        (1, 3 * TRITON_SPLIT + 5),
        (9, 2 * TRITON_SPLIT - 4),
        (1, TRITON_SPLIT - 1),
        (0, 7),
        (1, TRITON_SPLIT),
        (3, 0),
    ]
    if heads > 8:
        lengths = [(1, 2 * TRITON_SPLIT), (2, TRITON_SPLIT - 1)]
    with poisoned():
        Batch(1, lengths, heads, kv_heads, d, v_dim, page, padding=3).check(2e-5, **options)


@only_interpreter
@pytest.mark.usefixtures("impl", "way")
@pytest.mark.parametrize(
    ("way", "modifier"),
    [
        ("apart", "alibi"),
        ("in turn", "chunked"),
        *(pytest.param(*one, marks=pytest.mark.sweep) for one in (("in turn", ""), ("apart", "chunked"))),
    ],
    indirect=["way"],
)
def test_gradients_of_trees(way, modifier):
    """Shared prefixes of several splits, with a sink, a window and a soft-cap; CHUNKS begin splits late."""
    nodes = [Node(-1, 9, 2 * TRITON_SPLIT), Node(0, 5, 0), Node(0, 2, 0)]
    sinks = torch.tensor([0.3, 6.0, -40.0, 1.0])
    trees = PrefixTrees(3, heads=4, kv_heads=2, d=12, page=1, nodes=nodes, dtype=torch.float32)
    check_trees(trees, 60 if modifier else 0, 2.0, modifier, sinks)


@only_interpreter
@pytest.mark.usefixtures("impl", "way")
@pytest.mark.parametrize("way", ["apart", pytest.param("in turn", marks=pytest.mark.sweep)], indirect=True)
def test_latent_heads_of_several_splits(way):
    trees = PrefixTrees(
        4, heads=3, kv_heads=1, d=576, v_dim=512, nodes=[Node(-1, 3, 2 * TRITON_SPLIT)], dtype=torch.float32
    )
    trees.q *= (16 / 576) ** 0.5
    trees.v = trees.k[..., :512]
    check_trees(trees, tolerance=2e-5)


@only_interpreter
@pytest.mark.usefixtures("impl", "way")
def test_a_window_of_one_key_at_the_edge_of_a_split():
    """The first of the two queries of a tile sees nothing of the second one's split, and the value is a key's own."""
    nodes = [Node(-1, 2, 3 * TRITON_SPLIT - 1)]
    trees = PrefixTrees(5, heads=2, kv_heads=1, d=8, nodes=nodes, dtype=torch.float32)
    out, lse, *_ = run_trees(trees, window=1)
    assert (lse[:2] > -math.inf).all()
    rows = [int(trees.tables[0, 3 * TRITON_SPLIT - 1 + i]) for i in range(2)]
    assert torch.equal(out[:2], trees.v[rows].expand(-1, 2, -1))


@only_interpreter
@pytest.mark.usefixtures("impl", "way")
@pytest.mark.parametrize(
    ("window", "modifier"),
    [(0, ""), *(pytest.param(*one, marks=pytest.mark.sweep) for one in ((45, ""), (0, "chunked")))],
)
def test_bits_do_not_depend_on_chunks_neighbours_or_programs(window, modifier, monkeypatch):
    """Whole, in chunks and alone; beside longer and shorter sequences, so with other grids; in pages; in both ways."""
    heads, length = 4, 2 * TRITON_SPLIT + 9
    options = {}
    if modifier:
        options = {"modifier": modifier, "parameters": torch.tensor([[40.0], [7.0], [1000.0], [33.0]])}
    whole = Batch(8, [(length, 0)], heads, 2, 16)
    assert whole.q.shape[0] > TRITON_SPLIT

    def call(q, k, v, *plan):
        return attention(q, k, v, *plan, whole.scale, window, 0.0, **options)

    monkeypatch.setattr(tiles, "APART_ROWS", 0)
    out, lse = call(whole.q, whole.k, whole.v, whole.offsets, whole.kv_offsets, whole.kv_lengths, None, 0)
    monkeypatch.undo()
    rng = random.Random(9)
    cuts = sorted({0, TRITON_SPLIT - 3, TRITON_SPLIT, 2 * TRITON_SPLIT - 1, 2 * TRITON_SPLIT + 4, length - 1, length})
    for begin, end in itertools.pairwise(cuts):
        monkeypatch.setattr(tiles, "APART_ROWS", rng.choice([0, 512]))
        # Alone with exactly its keys (within one split: no split at all), and beside a longer neighbour in pages.
        plan = torch.tensor([0, end - begin]), whole.kv_offsets, torch.tensor([end]), None, 0
        rows = int(whole.kv_offsets[0])
        got = call(whole.q[begin:end], whole.k[: rows + end], whole.v[: rows + end], *plan)
        assert torch.equal(got[0], out[begin:end])
        assert torch.equal(got[1], lse[begin:end])
        noise = Batch(rng.randrange(1000), [(2, 3 * TRITON_SPLIT), (1, 5)], heads, 2, 16)
        packed = torch.cat([noise.q[:2], whole.q[begin:end], noise.q[2:]])
        tables = torch.zeros(3, max(whole.tables.shape[1], noise.tables.shape[1]), dtype=torch.int64)
        pages = whole.k_pool.shape[0] // whole.page
        tables[1, : whole.tables.shape[1]] = whole.tables[0]
        for row, source in ((0, 0), (2, 1)):
            tables[row, : noise.tables.shape[1]] = noise.tables[source] + pages
        plan = (
            torch.tensor([0, 2, 2 + end - begin, 3 + end - begin]), torch.zeros(3, dtype=torch.int64),
            torch.tensor([noise.kv[0], end, noise.kv[1]]), tables, whole.page,
        )  # fmt: skip
        pools = torch.cat([whole.k_pool, noise.k_pool]), torch.cat([whole.v_pool, noise.v_pool])
        got = call(packed, *pools, *plan)
        assert torch.equal(got[0][2 : 2 + end - begin], out[begin:end])
        assert torch.equal(got[1][2 : 2 + end - begin], lse[begin:end])


@only_interpreter
@pytest.mark.usefixtures("impl", "way")
@pytest.mark.parametrize("paged", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_skipping_what_a_modifier_hides_changes_no_bit(paged, monkeypatch):
    """Forward and every gradient with and without the bound; with it, whole tiles are not read."""
    from tests.helpers.attention_kernels import chunk_begin

    length, heads = 2 * TRITON_SPLIT + 7, 4
    q, k, v = (torch.randn(length, n, 16, generator=torch.Generator().manual_seed(n)) for n in (heads, 2, 2))
    parameters = torch.tensor([[16.0], [7.0], [40.0], [33.0]])
    plan = torch.tensor([0, length]), torch.tensor([0]), torch.tensor([length])
    tables = (torch.arange(length)[None], 1) if paged else (None, 0)
    position = torch.arange(length)
    query_ranges = torch.stack([torch.zeros_like(position), torch.full_like(position, length), position], 1)

    def everything():
        out, lse = attention(q, k, v, *plan, *tables, 0.3, 0, 0.0, None, "chunked", parameters)
        options = {"modifier": "chunked", "parameters": parameters, "query_ranges": query_ranges if paged else None}
        tensors = torch.ones_like(out), q, k, v, out, lse
        return out, lse, *attention_backward(*tensors, *plan, 0.3, 0, 0.0, *tables, **options)

    bare = everything()
    used = []
    bounded = {**find("chunked").device(), "first": chunk_begin}
    monkeypatch.setattr(modifiers.Modifier, "device", lambda self: used.append(self.name) or bounded)
    for a, b in zip(bare, everything()):
        assert torch.equal(a, b)
    assert used == ["chunked", "chunked"]
    # Keys of the chunks before the last queries' may be anything, which a weight of 0 would not forgive.
    k[:16], v[:16] = math.nan, math.nan
    last = torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([length])
    out, lse = attention(q[-3:], k, v, *last, *tables, 0.3, 0, 0.0, None, "chunked", parameters)
    assert out.isfinite().all()
    tensors = torch.ones_like(out), q[-3:], k, v, out, lse
    options = {"modifier": "chunked", "parameters": parameters, "query_ranges": None}
    if paged:
        options["query_ranges"] = torch.stack([torch.zeros_like(position), torch.full_like(position, 3), position], 1)
    assert attention_backward(*tensors, *last, 0.3, 0, 0.0, *tables, **options)[0].isfinite().all()
