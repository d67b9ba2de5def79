"""Gradients of attention through block tables: prefix trees against the same sequences unshared, in float64."""

import itertools
import math
import random
import textwrap

import pytest
import torch

from tests.helpers.attention import check_trees, run_trees
from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    impl_and,
    impl_dtype_and,
    implementations,
    only_triton,
)
from tests.helpers.interpreter import far_apart
from tests.helpers.prefix_trees import ORACLES, Node, PrefixTrees, error
from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention, attention_backward, modifiers
from toolkit.ops.registry import has_native

needs_native = pytest.mark.skipif(not has_native("attention"), reason="the native CPU library is not built")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2.0**-9}


def gradients(trees, out, lse, scale, window=0, softcap=0.0):
    offsets, starts, lengths, tables, page = trees.plan
    tensors = trees.grad, trees.q, trees.k, trees.v, out, lse, offsets, starts, lengths
    return attention_backward(*tensors, scale, window, softcap, tables, page)


SHAPES = [  # heads, kv_heads, d, v_dim, page, window, softcap
    (4, 2, 16, 16, 1, 0, 0.0),
    (4, 1, 20, 12, 4, 0, 0.0),
    (3, 3, 8, 8, 1, 11, 0.0),
    (6, 2, 16, 24, 16, 0, 4.0),
    (2, 1, 32, 32, 4, 6, 3.0),
    (18, 1, 8, 8, 1, 5, 0.0),
]


@impl_dtype_and("shape", SHAPES, (SHAPES[1], SHAPES[2], SHAPES[4]), [torch.float64, torch.float32])
def test_random_trees(impl, dtype, shape):
    heads, kv_heads, d, v_dim, page, window, softcap = shape
    sizes = {"heads": heads, "kv_heads": kv_heads, "d": d, "v_dim": v_dim, "page": page, "dtype": dtype}
    few = SMALL and impl is TRITON
    for seed in (5,) if few else range(6):
        small = {"trees": 1, "depth": 5, "longest": 5} if few else {}
        trees = PrefixTrees(seed, **sizes, **small, shuffled=seed % 2 == 0)
        check_trees(trees, window, softcap, tolerance=TOLERANCE[dtype])


@pytest.mark.usefixtures("impl")
def test_half_precision():
    check_trees(PrefixTrees(2, heads=2, kv_heads=1, trees=1, dtype=torch.float16), tolerance=TOLERANCE[torch.float16])


@impl_and("shuffled", [False, True], [True])
def test_a_long_prompt_with_completions(impl, shuffled):
    """Several tiles of keys, tasks of many rows, and rows that lie in one run or in none."""
    few = SMALL and impl is TRITON
    nodes = [Node(-1, 150, 20), *(Node(0, n, 0) for n in (70, 0, 33, 1))]
    if few:
        nodes = [Node(-1, 40, 5), Node(0, 20, 0), Node(0, 0, 0)]
    for dtype in impl.dtypes[: 1 if few else 2]:
        sizes = {"heads": 2, "kv_heads": 1} if few else {}
        for window in (0, 40):
            trees = PrefixTrees(1, nodes=nodes, shuffled=shuffled, dtype=dtype, **sizes)
            check_trees(trees, window, tolerance=TOLERANCE[dtype])


@implementations(REFERENCE, NATIVE)
@pytest.mark.usefixtures("impl")
def test_autograd_and_unread_rows():
    trees = PrefixTrees(3, page=4)
    leaves = [x.clone().requires_grad_() for x in (trees.q, trees.k, trees.v)]
    out, _ = attention(*leaves, *trees.plan, 0.3)
    grads = torch.autograd.grad(out, leaves, trees.grad)
    upcast = [x.clone().requires_grad_() for x in (trees.q, trees.k, trees.v)]
    wanted = torch.autograd.grad(trees.dense(*upcast, 0.3)[0], upcast, trees.grad)
    for actual, want in zip(grads, wanted):
        assert error(actual, want) < 1e-11
        assert actual.isfinite().all()


@implementations(REFERENCE, NATIVE)
@pytest.mark.usefixtures("impl")
def test_blocks_behind_the_window_may_be_null():
    """Their entries of the table are not read, forward or backward."""
    nodes = [Node(-1, 4, 60), Node(0, 8, 0), Node(0, 3, 0)]
    trees = PrefixTrees(4, page=4, nodes=nodes)
    expected = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3, 9)
    grads = gradients(trees, *expected, 0.3, 9)
    first = [60 - 9 + 1, 64 - 9 + 1, 64 - 9 + 1]
    for s, key in enumerate(first):
        trees.tables[s, : key // 4] = -7
    again = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3, 9)
    for actual, want in zip([again[0], *gradients(trees, *again, 0.3, 9)], [expected[0], *grads]):
        assert error(actual, want) < 1e-11


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float(dtype):
    trees = PrefixTrees(5, page=4, dtype=dtype)
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3)
    grads = gradients(trees, out, lse, 0.3)
    for name in ("q", "k", "v", "grad"):
        setattr(trees, name, getattr(trees, name).float())
    for actual, want in zip(grads[:3], gradients(trees, out.float(), lse, 0.3)):
        assert torch.equal(actual, want.to(dtype))


@needs_native
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1)])
def test_bits_do_not_depend_on_threads_or_on_where_rows_lie(heads, kv_heads):
    nodes = [Node(-1, 150, 0), *(Node(0, n, 0) for n in (70, 33, 1)), Node(1, 20, 0), Node(-1, 90, 0), Node(5, 5, 0)]
    nodes = [nodes[i] for i in (0, 1, 4, 2, 3, 5, 6)]  # depth first
    nodes[6].parent = 5
    trees = PrefixTrees(6, heads=heads, kv_heads=kv_heads, d=32, nodes=nodes, dtype=torch.float32, shuffled=False)
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(gradients(trees, out, lse, 0.2, 40))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))
    # The same rows elsewhere, and in pages.
    order = torch.randperm(trees.rows, generator=torch.Generator().manual_seed(0))
    index = torch.empty_like(order)
    index[order] = torch.arange(trees.rows)
    trees.k, trees.v = trees.k[order], trees.v[order]
    trees.tables = torch.where(trees.tables < trees.rows, index[trees.tables.clamp(max=trees.rows - 1)], 10**9)
    again = attention(trees.q, trees.k, trees.v, *trees.plan, 0.2)
    assert torch.equal(again[0], out)
    dq, dk, dv, _ = gradients(trees, *again, 0.2, 40)
    for actual, want in zip((dq, dk[index], dv[index]), results[0]):
        assert torch.equal(actual, want)


@needs_native
@pytest.mark.parametrize(("kv_heads", "page", "window", "modifier"), [
    (1, 1, 0, ""), (2, 4, 0, "chunked"), (1, 16, 90, ""), (1, 1, 60, "alibi"),
])  # fmt: skip
def test_bits_are_the_same_where_a_head_is_cut_among_threads(kv_heads, page, window, modifier):
    """One tree of few heads, and beside a small one: by blocks of queries and runs of keys, or by one thread."""
    nodes = [Node(-1, 256, 64), Node(0, 70, 0), Node(0, 33, 0), Node(-1, 9, 0)]
    trees = PrefixTrees(11, heads=4, kv_heads=kv_heads, d=20, v_dim=12, page=page, nodes=nodes, dtype=torch.float32)
    parameters = {"": None, "alibi": torch.full((4, 1), 0.1), "chunked": torch.full((4, 1), 70.0)}[modifier]
    options = {"sinks": torch.randn(4), "modifier": modifier, "parameters": parameters}
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.2, window, 3.0, **options)
    offsets, starts, lengths, tables, page = trees.plan
    tensors = trees.grad, trees.q, trees.k, trees.v, out, lse, offsets, starts, lengths
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            results.append(attention_backward(*tensors, 0.2, window, 3.0, tables, page, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@needs_native
@pytest.mark.parametrize("paged", [False, True])
def test_rows_that_are_shared_at_other_positions_are_summed_by_one_thread(paged):
    """Sequences that name one row as different keys: then tiles of keys share rows, and heads are not cut up."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(n, h, 16, generator=g) for n, h in ((120, 2), (200, 1), (200, 1), (120, 2)))
    offsets, starts, lengths = torch.tensor([0, 60, 120]), torch.tensor([0, 70]), torch.tensor([150, 130])
    tables = (starts[:, None] + torch.arange(150)).clamp(max=199) if paged else None
    plan = offsets, starts, lengths
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            out, lse = attention(q, k, v, *plan, tables, int(paged), 0.3)
            results.append(attention_backward(grad, q, k, v, out, lse, *plan, 0.3, 0, 0.0, tables, int(paged)))
    finally:
        torch.set_num_threads(threads)
    want = attention_backward(grad, q, k, v, out, lse, *plan, 0.3, 0, 0.0, tables, int(paged), impl="reference")
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        assert all(error(a, b) < 5e-6 for a, b in zip(result, want))


@needs_native
def test_a_row_of_a_tree_has_the_bits_of_its_sequence_alone():
    trees = PrefixTrees(7, heads=4, kv_heads=2, d=24, longest=40, dtype=torch.float32)
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3)
    dq = gradients(trees, out, lse, 0.3)[0]
    rng = random.Random(0)
    for keys, queries in rng.sample(trees.paths(), min(4, len(trees.paths()))):
        own = [(p, row) for p, row in enumerate(queries) if row >= 0]
        if not own:
            continue
        rows, n = [row for _, row in own], len(queries)
        plan = torch.tensor([0, len(rows)]), torch.tensor([0]), torch.tensor([n])
        tensors = trees.q[rows], trees.k[keys], trees.v[keys]
        alone = attention(*tensors, *plan, None, 0, 0.3)
        assert torch.equal(alone[0], out[rows])
        assert torch.equal(alone[1], lse[rows])
        assert torch.equal(attention_backward(trees.grad[rows], *tensors, *alone, *plan, 0.3)[0], dq[rows])


@needs_native
def test_page_of_one_row_in_order_has_the_bits_of_contiguous_keys():
    nodes = [Node(-1, 130, 0), Node(-1, 40, 0)]
    trees = PrefixTrees(8, d=32, nodes=nodes, padding=0, dtype=torch.float32, shuffled=False)
    plan = trees.query_offsets, trees.query_offsets[:-1].contiguous(), trees.kv_lengths
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3)
    assert torch.equal(attention(trees.q, trees.k, trees.v, *plan, None, 0, 0.3)[0], out)
    want = attention_backward(trees.grad, trees.q, trees.k, trees.v, out, lse, *plan, 0.3)
    for a, b in zip(gradients(trees, out, lse, 0.3), want):
        assert torch.equal(a, b)


@needs_native
def test_bad_pages_are_named_in_backward():
    trees = PrefixTrees(9, page=4)
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3)
    trees.tables = trees.tables.clone()
    trees.tables[int(trees.kv_lengths.argmax()), 0] = trees.rows
    with pytest.raises(RuntimeError, match=f"block_tables names page {trees.rows} but"):
        gradients(trees, out, lse, 0.3)


def test_opcheck():
    trees = PrefixTrees(10, page=4, trees=1, depth=2, longest=4)
    leaves = [x.requires_grad_() for x in (trees.q, trees.k.nan_to_num(0), trees.v.nan_to_num(0))]
    torch.library.opcheck(torch.ops.toolkit.attention.default, (*leaves, *trees.plan, 0.3, 0, 0.0))
    trees.q, trees.k, trees.v = (x.detach() for x in leaves)
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3)
    offsets, starts, lengths, tables, page = trees.plan
    tensors = trees.grad, trees.q, trees.k, trees.v, out, lse, offsets, starts, lengths
    torch.library.opcheck(torch.ops.toolkit.attention_backward.default, (*tensors, 0.3, 0, 0.0, tables, page))


@impl_and("modifier, sunk", itertools.product(ORACLES, [False, True]), [(one, True) for one in ORACLES])
@pytest.mark.usefixtures("impl")
def test_sinks_and_modifiers(modifier, sunk):
    sinks = torch.tensor([0.3, 6.0, -40.0, 40.0]) if sunk else None
    nodes = [Node(-1, 12, 0), Node(0, 9, 0), Node(0, 3, 0)]
    trees = PrefixTrees(3, heads=4, kv_heads=2, d=12, page=4, nodes=nodes, dtype=torch.float32)
    check_trees(trees, 9 if sunk else 0, 2.0 if sunk else 0.0, modifier, sinks)


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(
    ("d", "v_dim", "heads"), [(576, 512, 17), (300, 280, 2), pytest.param(512, 64, 1, marks=pytest.mark.sweep)]
)
def test_large_heads(d, v_dim, heads):
    """Slices of the head, and a rest beside a power of two; all query heads share one of keys and values."""
    nodes = [Node(-1, 9, 12), Node(0, 3, 0), Node(0, 2, 0)]
    if heads > 8:
        nodes = [Node(-1, 2, 3), Node(0, 1, 0)]
    trees = PrefixTrees(4, heads=heads, kv_heads=1, d=d, v_dim=v_dim, nodes=nodes, dtype=torch.float32)
    trees.q *= (16 / d) ** 0.5
    check_trees(trees, tolerance=2e-5)
    plan = trees.query_offsets[:2], torch.tensor([0]), trees.kv_lengths[:1]
    k, v = trees.k.nan_to_num(0), trees.v.nan_to_num(0)
    q, grad = trees.q[: nodes[0].queries], trees.grad[: nodes[0].queries]
    out, lse = attention(q, k, v, *plan, None, 0, 0.3, 0, 0.0)
    got = attention_backward(grad, q, k, v, out, lse, *plan, 0.3, 0, 0.0)
    tables = torch.arange(k.shape[0])[None]
    query_ranges = torch.zeros(k.shape[0], 3, dtype=torch.int64)
    length = int(trees.kv_lengths[0])
    query_ranges[:length, 1], query_ranges[:length, 2] = q.shape[0], torch.arange(length)
    rest = {"block_tables": tables, "block_size": 1, "query_ranges": query_ranges}
    for a, b in zip(got, attention_backward(grad, q, k, v, out, lse, *plan, 0.3, 0, 0.0, **rest)):
        assert error(a, b) < 1e-6


@pytest.mark.usefixtures("impl")
def test_values_that_are_a_part_of_the_keys():
    trees = PrefixTrees(5, heads=2, kv_heads=1, d=24, v_dim=16, trees=1, dtype=torch.float32)
    trees.v = trees.k[..., :16]
    check_trees(trees)


@pytest.mark.usefixtures("impl")
def test_rows_that_nobody_reads_may_be_anything_and_runs_are_equal():
    trees = PrefixTrees(6, heads=2, kv_heads=2, trees=1, page=4, dtype=torch.float32)
    first = run_trees(trees)
    trees.k[~trees.held], trees.v[~trees.held] = math.inf, -math.inf
    trees.query_ranges[~trees.held] = torch.tensor([5, 5, 3])
    for a, b in zip(first, run_trees(trees)):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("impl")
def test_gradients_of_a_leaf_do_not_depend_on_its_neighbours():
    """dq of a node's rows, and dk and dv of a leaf's, are those of the node's own sequence alone."""
    nodes = [Node(-1, 16, 0), Node(0, 6, 0), Node(0, 9, 0)]
    trees = PrefixTrees(7, heads=2, kv_heads=1, nodes=nodes, dtype=torch.float32, padding=0, shuffled=False)
    out, lse, dq, dk, dv, _ = run_trees(trees)
    alone = PrefixTrees(7, heads=2, kv_heads=1, nodes=nodes[:2], dtype=torch.float32, padding=0, shuffled=False)
    alone.q, alone.grad, alone.k, alone.v = trees.q[:22], trees.grad[:22], trees.k[:25], trees.v[:25]
    got = run_trees(alone)
    for actual, want in zip(got[:3], (out, lse, dq)):
        assert error(actual, want[:22]) < 1e-6
    for actual, want in zip(got[3:5], (dk, dv)):
        assert error(actual[16:22], want[16:22]) < 1e-6


@only_triton
@pytest.mark.usefixtures("impl")
def test_offsets_past_two_to_the_31():
    trees = PrefixTrees(8, heads=1, kv_heads=1, trees=1, depth=2, longest=3, dtype=torch.float32)
    want = run_trees(trees)
    trees.k, trees.v = far_apart(trees.k), far_apart(trees.v)
    assert torch.equal(attention(trees.q, trees.k, trees.v, *trees.plan, 0.3, 0, 0.0)[0], want[0])
    trees.q, trees.grad = far_apart(trees.q), far_apart(trees.grad)
    for a, b in zip(run_trees(trees), want):
        assert torch.equal(a, b)


@only_triton
@pytest.mark.usefixtures("impl")
def test_a_new_modifier_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "cubic.py").write_text(textwrap.dedent(CUBIC))
    monkeypatch.setattr(modifiers, "__path__", [*modifiers.__path__, str(tmp_path)])
    modifiers.discover()
    parameters = torch.tensor([[0.3, 2.0], [0.1, 3.0]])

    def score(x, query, key, head):
        x = x + parameters[head, 0].double() * x.pow(3)
        return x.masked_fill((query - key) % parameters[head, 1].long() != 0, -math.inf)

    try:
        trees = PrefixTrees(9, heads=2, kv_heads=1, d=8, trees=1, depth=3, dtype=torch.float32)
        check_trees(trees, 0, 2.0, (score, parameters))
    finally:
        monkeypatch.undo()
        modifiers.discover()


@only_triton
@pytest.mark.usefixtures("impl")
def test_bad_input_is_one_sentence():
    trees = PrefixTrees(10, trees=1, depth=2, dtype=torch.float32)
    offsets, starts, lengths, tables, page = trees.plan
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3, 0, 0.0)
    tensors = trees.grad, trees.q, trees.k, trees.v, out, lse, offsets, starts, lengths
    with pytest.raises(ToolkitError, match=r"query_ranges must have shape .* in Triton, got None"):
        attention_backward(*tensors, 0.3, 0, 0.0, tables, page)
    with pytest.raises(ToolkitError, match=r"query_ranges must have shape .*, got shape"):
        attention_backward(*tensors, 0.3, 0, 0.0, tables, page, query_ranges=trees.query_ranges[:1])
    joined = torch.empty(4, 1, 600)
    with pytest.raises(ToolkitError, match=r"head size of v must be <= 512 .* got 600"):
        attention(joined, joined, joined, offsets, starts, lengths, None, 0, 0.3, 0, 0.0)


CUBIC = """
    from typing import TYPE_CHECKING

    if TYPE_CHECKING:
        import triton.language as tl

    def score(s, query, key, amount, step):
        return s + amount * s**3

    def triton_score(s, query, key, p):
        return s + tl.load(p) * s * s * s

    def triton_both(s, query, key, p):
        amount = tl.load(p)
        return s + amount * s * s * s, 1.0 + 3.0 * amount * s * s

    def triton_visible(query, key, p):
        return (query - key) % tl.load(p + 1).to(tl.int32) == 0
"""
