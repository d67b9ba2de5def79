"""attention with spans against a dense float64 mask: values, every gradient, and bits that no schedule changes."""

import random

import pytest
import torch

from tests.helpers.attention import Batch, make, offsets, packed
from tests.helpers.implementations import NATIVE, REFERENCE, SMALL, TRITON, implementations, parameter
from tests.helpers.prefix_trees import CHUNKS, ORACLES, Node, PrefixTrees, error
from tests.helpers.rowwise import THREADS, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention, attention_backward

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def picture_spans(length, rng, longest):
    """Random spans of a sequence of ``length`` tokens, in order: some touch, some are one token."""
    found, at = [], rng.randint(0, 3)
    while at < length:
        end = min(length, at + rng.choice([1, longest, rng.randint(1, longest)]))
        found.append((at, end))
        at = end + rng.choice([0, 1, rng.randint(1, longest)])
    return found


def of_rows(spans, first, length, own_position=False):
    """[length - first, 2] of the tokens from ``first`` on; with ``own_position`` a span begins with its row."""
    rows = torch.zeros(length, 2, dtype=torch.int64)
    for begin, end in spans:
        rows[begin:end, 0], rows[begin:end, 1] = begin, end
        if own_position:
            rows[begin:end, 0] = torch.arange(begin, end)
    return rows[first:]


def visible(position, length, window, rows, chunk=0):
    """[queries, keys] by the formula in the op's docstring."""
    query, key = position[:, None], torch.arange(length)[None, :]
    seen = key <= query
    if window:
        seen = seen & (key > query - window)
    if chunk:
        seen = seen & (key // chunk == query // chunk)
    return seen | (key >= rows[:, :1]) & (key < rows[:, 1:])


def masked(q, k, v, seen, scale, softcap=0.0, sink=None, bias=None):
    """One head: (out, lse) of rows that see something; zeros and the sink, or -inf, elsewhere."""
    x = q @ k.T * scale
    x = softcap * (x / softcap).tanh() if softcap else x
    x = x if bias is None else x + bias
    x = x.masked_fill(~seen, -torch.inf)
    if sink is not None:
        x = torch.cat([x, sink.expand(len(q), 1)], 1)
    some = (x > -torch.inf).any(-1, keepdim=True)
    x = torch.where(some, x, 0.0)
    weights = torch.where(some, x.softmax(-1), 0.0)[:, : len(k)]
    return weights @ v, torch.where(some, x.logsumexp(-1, keepdim=True), -torch.inf)[:, 0]


def oracle(q, k, v, lengths, kv_offsets, kv_lengths, spans, scale, window=0, softcap=0.0, sinks=None, modifier=""):
    """Sequences one after the other, head by head, in float64."""
    group, at, outs, sums = q.shape[1] // k.shape[1], 0, [], []
    for count, start, length in zip(lengths, kv_offsets, kv_lengths):
        position = torch.arange(length - count, length)
        heads = []
        for h in range(q.shape[1]):
            chunk = int(CHUNKS[h, 0]) if modifier == "chunked" else 0
            seen = visible(position, length, window, spans[at : at + count], chunk)
            distance = torch.arange(length)[None, :] - position[:, None]
            bias = ORACLES["alibi"][0](torch.zeros(()), -distance, 0, h) if modifier == "alibi" else None
            own = k[start : start + length, h // group], v[start : start + length, h // group]
            sink = None if sinks is None else sinks[h]
            heads.append(masked(q[at : at + count, h], *own, seen, scale, softcap, sink, bias))
        outs.append(torch.stack([out for out, _ in heads], 1))
        sums.append(torch.stack([lse for _, lse in heads], 1))
        at += count
    return torch.cat(outs), torch.cat(sums)


CASES = [  # D, Dv, Hq, Hkv, window, softcap, modifier, sunk
    (32, 32, 2, 2, 0, 0.0, "", False),
    (40, 24, 4, 2, 7, 0.0, "", True),
    (20, 20, 4, 1, 0, 5.0, "chunked", False),
    (16, 5, 4, 1, 11, 3.0, "alibi", True),
    (64, 64, 7, 1, 64, 0.0, "", False),
]


def swept(one):
    return pytest.param(*one.values, marks=[*one.marks, pytest.mark.sweep], id=one.id)


def natively(*cases):
    """Every case natively, and in the sweep for Triton: torch chooses the order of the reference's sums."""
    return [parameter(NATIVE, *one) for one in cases] + [swept(parameter(TRITON, *one)) for one in cases]


def cases():
    """A few cases for each dtype; the rest in the sweep."""
    for impl in (REFERENCE, NATIVE, TRITON):
        for dtype in impl.dtypes:
            for case in CASES:
                one = parameter(impl, dtype, case)
                few = case is CASES[3] if impl is TRITON or dtype is not torch.float32 else impl is NATIVE
                fast = few and (impl is not TRITON or dtype is torch.float32)
                yield one if fast else swept(one)


@pytest.mark.parametrize(("impl", "dtype", "case"), cases(), indirect=["impl"])
def test_forward_and_gradients(impl, dtype, case):
    """Keys that no sequence has, between sequences, are NaN, and so are later keys that no row may see."""
    d, dv, hq, hkv, window, softcap, modifier, sunk = case
    few = SMALL and impl is TRITON
    sequences = [(12, 5), (0, 3), (1, 9)] if few else [(90, 0), (0, 5), (130, 40), (1, 17)]
    rng = random.Random(str(case))
    batch = Batch(1, sequences, hq, hkv, d, dv, dtype=dtype, padding=3)
    spans = [
        of_rows(picture_spans(past + n, rng, 9 if few else 70), past, past + n, rng.random() < 0.5)
        for n, past in sequences
    ]
    spans = torch.cat([*spans, torch.full((3, 2), 7)])  # padding rows' are not looked at
    plan, scale = (batch.offsets, batch.kv_offsets, batch.kv_lengths), 1.7 * d**-0.5
    unread = batch.k[:, 0, 0].isnan()
    sinks = torch.linspace(-3, 4, hq).to(dtype) if sunk else None
    leaves = [x.double().nan_to_num(0.0).requires_grad_() for x in (batch.q, batch.k, batch.v)]
    leaves += [] if sinks is None else [sinks.double().requires_grad_()]
    layout = batch.queries, batch.kv_offsets.tolist(), batch.kv
    own = leaves[3] if sunk else None
    expected, expected_lse = oracle(*leaves[:3], *layout, spans, scale, window, softcap, own, modifier)
    rows = len(expected)
    grad = seeded(len(batch.q), hq, dv, dtype=dtype, seed=9)
    wanted = torch.autograd.grad(expected, leaves, grad[:rows].double())
    options = {"sinks": sinks, "modifier": modifier, "parameters": ORACLES[modifier][1], "spans": spans}
    out, lse = attention(batch.q, batch.k, batch.v, *plan, None, 0, scale, window, softcap, **options)
    given = grad, batch.q, batch.k, batch.v, out, lse, *plan, scale, window, softcap
    grads = attention_backward(*given, **options)
    assert error(out[:rows], expected) < TOLERANCE[dtype]
    assert (out[rows:] == 0).all()
    assert torch.equal(lse[:rows].isinf(), expected_lse.isinf())
    near = 2 * TOLERANCE[torch.float32] if dtype != torch.float64 else TOLERANCE[dtype]
    assert error(lse[:rows].nan_to_num(0, 0, 0), expected_lse.nan_to_num(0, 0, 0)) < near
    for name, actual, want in zip(("dq", "dk", "dv", "dsinks"), grads, wanted):
        assert error(actual, want) < (1e-10 if dtype == torch.float64 else 4 * TOLERANCE[dtype]), name
    for x in grads[1:3]:
        assert (x[unread] == 0).all()


@pytest.mark.parametrize(("impl", "window", "softcap"), natively((0, 0.0), (7, 3.0)), indirect=["impl"])
def test_without_a_span_every_bit_is_as_without_spans(impl, window, softcap):
    """Rows in no span, and spans that hold only what is seen anyway, on random schedules; gradients too."""
    rng = random.Random(window)
    lengths = [rng.randint(0, 9) for _ in range(4)] if SMALL and impl is TRITON else [90, 1, 0, 140]
    plan, rows = packed(lengths, 2)
    q, k, v = make(rows, 4, 2, 24, 24, torch.float32)
    grad = seeded(rows, 4, 24, dtype=torch.float32, seed=9)
    found = []
    own = torch.cat([torch.arange(n) for n in [*lengths, 2]])
    some = torch.stack([own, own + 1], 1) * torch.tensor([rng.randint(0, 1) for _ in own])[:, None]
    for spans in (None, torch.zeros(rows, 2, dtype=torch.int64), some):
        out, lse = attention(q, k, v, *plan, None, 0, 0.2, window, softcap, spans=spans)
        grads = attention_backward(grad, q, k, v, out, lse, *plan, 0.2, window, softcap, spans=spans)
        found.append([out, lse, *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize(("impl", "window", "whole"), natively((0, True), (9, False), (9, True)), indirect=["impl"])
def test_bits_do_not_depend_on_schedule(impl, window, whole):
    """Chunks that cut no span, in blocks of several sizes, beside others, on 1 and 2 threads."""
    rng = random.Random(window + whole)
    few = SMALL and impl is TRITON
    lengths = [17, 5] if few else [150, 70, 33]
    pictures = [picture_spans(n, rng, 6 if few else 40) for n in lengths]
    spans = [of_rows(own, 0, n, not whole) for own, n in zip(pictures, lengths)]
    plan, rows = packed(lengths)
    q, k, v = make(rows, 6, 2, 24, 12, torch.float32)
    options = 0.2, window, 2.0
    whole_call = attention(q, k, v, *plan, None, 0, *options, spans=torch.cat(spans))
    starts = offsets(lengths).tolist()
    for i, block_size in enumerate((4,) if few else (4, 16, 48)):
        with threads(THREADS[i % len(THREADS)]):
            again = attention(q, k, v, *plan, None, 0, *options, spans=torch.cat(spans))
            pages = [-(-n // block_size) for n in lengths]
            order = list(range(sum(pages) + 3))
            rng.shuffle(order)
            tables = torch.zeros(len(lengths), max(pages), dtype=torch.int64)
            for s, count in enumerate(pages):
                tables[s, :count] = torch.tensor([order.pop() for _ in range(count)])
            pools = [
                torch.full((len(order) * block_size + sum(pages) * block_size, *x.shape[1:]), torch.nan) for x in (k, v)
            ]
            done, out, lse = (
                [0] * len(lengths),
                torch.full_like(whole_call[0], torch.nan),
                torch.full_like(q[..., 0], 7),
            )
            while done != lengths:
                alive = [s for s in range(len(lengths)) if done[s] < lengths[s]]
                call = rng.sample(alive, rng.randint(1, len(alive)))
                index, ends = [], []
                for s in call:
                    end = min(lengths[s], done[s] + rng.randint(1, 30))
                    end = next((last for first, last in pictures[s] if first < end < last), end)
                    own = torch.arange(done[s], end)
                    slot = tables[s, own // block_size] * block_size + own % block_size
                    for pool, x in zip(pools, (k, v)):
                        pool[slot] = x[starts[s] + own]
                    index.append(starts[s] + own)
                    ends.append(end)
                    done[s] = end
                rows_of = torch.cat(index)
                layout = (
                    offsets([len(one) for one in index]),
                    torch.zeros(len(call), dtype=torch.int64),
                    torch.tensor(ends),
                )
                out[rows_of], lse[rows_of] = attention(
                    q[rows_of], *pools, *layout, tables[call], block_size, *options, spans=torch.cat(spans)[rows_of]
                )
        for found in (again, (out, lse)):
            assert all(torch.equal(a, b) for a, b in zip(found, whole_call, strict=True))


def span_of_nodes(trees, rng, longest):
    """Random spans of a tree's rows, each within its node, and the ranges of queries of each key with them."""
    spans = torch.zeros(len(trees.q), 2, dtype=torch.int64)
    ranges, starts = trees.query_ranges.clone(), trees.query_offsets.tolist()
    for i, node in enumerate(trees.nodes):
        length = int(trees.kv_lengths[i])
        past = length - node.queries
        own = [(first + past, end + past) for first, end in picture_spans(node.queries, rng, longest)]
        spans[starts[i] : starts[i + 1]] = of_rows(own, past, length, rng.random() < 0.5)
    return spans, ranges


TREES = [(4, 5, "chunked", True), (1, 0, "", False), (1, 3, "alibi", False)]


@pytest.mark.parametrize(
    ("impl", "page", "window", "modifier", "sunk"),
    [parameter(impl, *one) for impl in (REFERENCE, NATIVE) for one in TREES]
    + [parameter(TRITON, *TREES[0]), *(swept(parameter(TRITON, *one)) for one in TREES[1:])],
    indirect=["impl"],
)
def test_prefix_trees(impl, page, window, modifier, sunk):
    """Spans within the segments of a tree, whose keys are shared; the oracle attends leaf by leaf."""
    rng = random.Random(page + window)
    nodes = [Node(-1, 12, 4), Node(0, 9, 0), Node(0, 4, 0), Node(2, 8, 0), Node(-1, 7, 0)]
    trees = PrefixTrees(3, heads=4, kv_heads=2, d=12, page=page, nodes=nodes, dtype=impl.dtypes[0])
    spans, ranges = span_of_nodes(trees, rng, 5)
    sinks = torch.tensor([0.3, 6.0, -40.0, 4.0], dtype=impl.dtypes[0]) if sunk else None
    leaves = [x.double().nan_to_num(0.0).requires_grad_() for x in (trees.q, trees.k, trees.v)]
    leaves += [] if sinks is None else [sinks.double().requires_grad_()]
    end = int(trees.query_offsets[-1])
    expected = torch.zeros(end, 4, 12, dtype=torch.float64)
    for i, node in enumerate(trees.nodes):
        rows = torch.arange(int(trees.query_offsets[i]), int(trees.query_offsets[i + 1]))
        length = int(trees.kv_lengths[i])
        key = torch.arange(length)
        slot = trees.tables[i, key // page] * page + key % page
        own, sink = [leaves[0][rows], leaves[1][slot], leaves[2][slot]], leaves[3] if sunk else None
        one = oracle(*own, [node.queries], [0], [length], spans[rows], 0.3, window, 2.0, sink, modifier)[0]
        expected = expected.index_put((rows,), one)
    wanted = torch.autograd.grad(expected, leaves, trees.grad[:end].double())
    options = {
        "sinks": sinks,
        "modifier": modifier,
        "parameters": ORACLES[modifier][1],
        "query_ranges": ranges,
        "spans": spans,
    }
    out, lse = attention(trees.q, trees.k, trees.v, *trees.plan, 0.3, window, 2.0, **options)
    query_offsets, starts, lengths, tables, _ = trees.plan
    given = (
        trees.grad,
        trees.q,
        trees.k,
        trees.v,
        out,
        lse,
        query_offsets,
        starts,
        lengths,
        0.3,
        window,
        2.0,
        tables,
        page,
    )
    grads = attention_backward(*given, **options)
    bound = 1e-10 if impl.dtypes[0] == torch.float64 else 1e-5
    assert error(out[:end], expected) < bound
    for name, actual, want in zip(("dq", "dk", "dv", "dsinks"), grads, wanted):
        assert error(actual, want) < 2 * bound, name


@pytest.mark.parametrize("impl", [parameter(REFERENCE), parameter(NATIVE), swept(parameter(TRITON))], indirect=["impl"])
def test_attention_of_an_encoder_and_of_runs(impl):
    """One span over the whole sequence is torch's attention without a mask; with window 1 any run of keys is seen."""
    lengths = [11, 1, 20]
    plan, rows = packed(lengths)
    q, k, v = make(rows, 4, 2, 16, 16, impl.dtypes[0])
    whole = torch.cat([torch.tensor([[0, n]]).expand(n, 2) for n in lengths])
    position = torch.cat([torch.arange(n) for n in lengths])
    length = torch.cat([torch.full((n,), n) for n in lengths])
    both_sides = torch.stack([(position - 3).clamp_min(0), torch.minimum(position + 4, length)], 1)
    for spans, window in ((whole, 0), (whole, 1), (both_sides, 1), (both_sides, 4)):
        out, _ = attention(q, k, v, *plan, window=window, spans=spans)
        for s, n in enumerate(lengths):
            own = slice(int(plan[0][s]), int(plan[0][s]) + n)
            heads = [x[own].double().transpose(0, 1) for x in (q, k, v)]
            key = torch.arange(n)
            mask = (key >= spans[own][:, :1]) & (key < spans[own][:, 1:])
            want = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
            assert error(out[own], want.transpose(0, 1)) < TOLERANCE[q.dtype]


@implementations(REFERENCE, NATIVE)
def test_a_span_past_the_end_is_cut_and_no_tokens(impl):
    plan, rows = packed([5])
    q, k, v = make(rows, 2, 1, 8, 8, impl.dtypes[0])
    spans = torch.tensor([[0, 0], [0, 0], [2, 99], [2, 99], [2, 99]])
    cut = torch.where(spans == 99, 5, spans)
    assert torch.equal(attention(q, k, v, *plan, spans=spans)[0], attention(q, k, v, *plan, spans=cut)[0])
    none = torch.zeros(1, dtype=torch.int64)
    out, lse = attention(q[:0], k, v, none, none[:0], none[:0], spans=spans[:0])
    assert (out.shape, lse.shape) == ((0, 2, 8), (0, 2))
    grads = attention_backward(out, q[:0], k, v, out, lse, none, none[:0], none[:0], 1.0, spans=spans[:0])
    assert not any(x.any() for x in grads)


@implementations(NATIVE)
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("impl_name", ["reference", "cpu"])
def test_spans_that_do_not_fit_are_named(impl_name):
    plan, rows = packed([6])
    q, k, v = make(rows, 2, 1, 8, 8, torch.float32)
    for bad, problem in (
        ([[0, 0], [2, 4], [2, 4], [2, 4], [0, 0], [0, 0]], "position"),
        ([[0, 0], [-1, 4], [0, 0], [0, 0], [0, 0], [0, 0]], "position"),
        ([[0, 0], [1, 5], [0, 0], [0, 0], [0, 0], [0, 0]], "neither end"),
    ):
        with pytest.raises((ToolkitError, RuntimeError), match=f"spans .*{problem}"):
            attention(q, k, v, *plan, spans=torch.tensor(bad), impl=impl_name)
    late = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 0], [0, 6], [0, 0]])
    with pytest.raises((ToolkitError, RuntimeError), match="neither end"):
        attention(q, k, v, *plan, window=2, spans=late, impl=impl_name)
    for bad in (torch.zeros(5, 2, dtype=torch.int64), torch.zeros(6, 2)):
        with pytest.raises(ToolkitError, match=r"spans must be int64 of shape \[6, 2\]"):
            attention(q, k, v, *plan, spans=bad, impl=impl_name)


@implementations(NATIVE)
@pytest.mark.usefixtures("impl")
def test_gradients_are_the_same_on_any_threads():
    """One sequence whose head is cut among threads, by blocks of queries and runs of keys."""
    rng = random.Random(5)
    plan, rows = packed([300])
    q, k, v = make(rows, 4, 1, 20, 12, torch.float32)
    spans = of_rows(picture_spans(300, rng, 90), 0, 300)
    grad = seeded(rows, 4, 12, dtype=torch.float32, seed=9)
    results = []
    for count in (1, 2, 5, 16):
        with threads(count):
            out, lse = attention(q, k, v, *plan, None, 0, 0.2, 60, 3.0, spans=spans)
            results.append([out, lse, *attention_backward(grad, q, k, v, out, lse, *plan, 0.2, 60, 3.0, spans=spans)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    reference = attention_backward(grad, q, k, v, *results[0][:2], *plan, 0.2, 60, 3.0, spans=spans, impl="reference")
    assert all(error(a, b) < 5e-6 for a, b in zip(results[0][2:], reference))
