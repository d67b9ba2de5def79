"""Triton attention in Triton's interpreter: forests with gradients, sinks, modifiers and wide heads, against dense
float64 attention of the unshared sequences."""

import math
import textwrap

import pytest
import torch

from tests.helpers.interpreter import far_apart, poisoned
from tests.helpers.prefix_trees import ORACLES, Forest, Node, error
from toolkit.errors import ToolkitError
from toolkit.ops.attention import modifiers
from toolkit.ops.attention.triton import attention
from toolkit.ops.attention.triton_backward import attention_backward


def run(forest, scale=0.3, window=0, softcap=0.0, **options):
    with poisoned():
        out, lse = attention(forest.q, forest.k, forest.v, *forest.plan, scale, window, softcap, **options)
        offsets, starts, lengths, tables, page = forest.plan
        tensors = forest.grad, forest.q, forest.k, forest.v, out, lse, offsets, starts, lengths
        rest = {"block_tables": tables, "block_size": page, "query_ranges": forest.query_ranges, **options}
        return out, lse, *attention_backward(*tensors, scale, window, softcap, **rest)


def check(forest, window=0, softcap=0.0, modifier="", sinks=None, tolerance=1e-5):
    score, parameters = ORACLES.get(modifier, modifier)
    wide = [x.double().requires_grad_() for x in (forest.q, forest.k, forest.v)]
    wide += [] if sinks is None else [sinks.double().requires_grad_()]
    own = wide[3] if sinks is not None else None
    expected, expected_lse = forest.dense(*wide[:3], 0.3, window, softcap, own, score)
    wanted = torch.autograd.grad(expected, wide, forest.grad.double())
    options = {"sinks": sinks, "modifier": modifier if modifier in ORACLES else "bent", "parameters": parameters}
    out, lse, *grads = run(forest, 0.3, window, softcap, **options)
    end = int(forest.query_offsets[-1])
    assert error(out, expected) < tolerance
    assert error(lse[:end], expected_lse[:end]) < 1e-5
    assert (lse[end:] == -math.inf).all()
    for name, actual, want in zip(("dq", "dk", "dv", "dsinks"), grads, wanted):
        assert error(actual, want) < 2 * tolerance, name
    for x in grads[1:3]:
        assert (x[~forest.held] == 0).all()
    if sinks is None:
        assert grads[3].shape == (0,)


@pytest.mark.parametrize(
    ("seed", "heads", "kv_heads", "d", "v_dim", "page", "window", "softcap"),
    [
        (33, 4, 2, 16, 16, 1, 0, 0.0),
        (5, 3, 1, 20, 12, 4, 6, 0.0),
        (11, 2, 2, 8, 24, 4, 0, 3.0),
        (5, 18, 1, 8, 8, 1, 5, 0.0),
    ],
)
def test_random_trees(seed, heads, kv_heads, d, v_dim, page, window, softcap):
    sizes = {"heads": heads, "kv_heads": kv_heads, "d": d, "v_dim": v_dim, "page": page}
    forest = Forest(seed, **sizes, trees=1, depth=5, longest=5, dtype=torch.float32, shuffled=seed != 11)
    assert 8 <= len(forest.nodes) <= 11
    check(forest, window, softcap)


def test_a_long_prompt_with_completions():
    nodes = [Node(-1, 40, 5), *(Node(0, n, 0) for n in (20, 0, 7))]
    check(Forest(1, heads=2, kv_heads=1, nodes=nodes, dtype=torch.float32, shuffled=False))
    check(Forest(1, heads=2, kv_heads=1, nodes=nodes, dtype=torch.float32), window=11)


def test_half_precision():
    check(Forest(2, heads=2, kv_heads=1, trees=1, dtype=torch.float16), tolerance=2**-9)


@pytest.mark.parametrize("modifier", ORACLES)
@pytest.mark.parametrize("sunk", [False, True])
def test_sinks_and_modifiers(modifier, sunk):
    sinks = torch.tensor([0.3, 6.0, -40.0, 40.0]) if sunk else None
    nodes = [Node(-1, 12, 0), Node(0, 9, 0), Node(0, 3, 0)]
    forest = Forest(3, heads=4, kv_heads=2, d=12, page=4, nodes=nodes, dtype=torch.float32)
    check(forest, 9 if sunk else 0, 2.0 if sunk else 0.0, modifier, sinks)


@pytest.mark.parametrize(("d", "v_dim", "heads"), [(576, 512, 17), (300, 280, 2), (512, 64, 1)])
def test_wide_heads(d, v_dim, heads):
    """Slices of the head, and a rest beside a power of two; all query heads share one of keys and values."""
    nodes = [Node(-1, 9, 12), Node(0, 3, 0), Node(0, 2, 0)]
    if heads > 8:
        nodes = [Node(-1, 2, 3), Node(0, 1, 0)]
    forest = Forest(4, heads=heads, kv_heads=1, d=d, v_dim=v_dim, nodes=nodes, dtype=torch.float32)
    forest.q *= (16 / d) ** 0.5
    check(forest, tolerance=2e-5)
    plan = forest.query_offsets[:2], torch.tensor([0]), forest.kv_lengths[:1]
    k, v = forest.k.nan_to_num(0), forest.v.nan_to_num(0)
    q, grad = forest.q[: nodes[0].queries], forest.grad[: nodes[0].queries]
    out, lse = attention(q, k, v, *plan, None, 0, 0.3, 0, 0.0)
    got = attention_backward(grad, q, k, v, out, lse, *plan, 0.3, 0, 0.0)
    tables = torch.arange(k.shape[0])[None]
    query_ranges = torch.zeros(k.shape[0], 3, dtype=torch.int64)
    length = int(forest.kv_lengths[0])
    query_ranges[:length, 1], query_ranges[:length, 2] = q.shape[0], torch.arange(length)
    rest = {"block_tables": tables, "block_size": 1, "query_ranges": query_ranges}
    for a, b in zip(got, attention_backward(grad, q, k, v, out, lse, *plan, 0.3, 0, 0.0, **rest)):
        assert error(a, b) < 1e-6


def test_values_that_are_a_part_of_the_keys():
    forest = Forest(5, heads=2, kv_heads=1, d=24, v_dim=16, trees=1, dtype=torch.float32)
    forest.v = forest.k[..., :16]
    check(forest)


def test_rows_that_nobody_reads_may_be_anything_and_runs_are_equal():
    forest = Forest(6, heads=2, kv_heads=2, trees=1, page=4, dtype=torch.float32)
    first = run(forest)
    forest.k[~forest.held], forest.v[~forest.held] = math.inf, -math.inf
    forest.query_ranges[~forest.held] = torch.tensor([5, 5, 3])
    for a, b in zip(first, run(forest)):
        assert torch.equal(a, b)


def test_gradients_of_a_leaf_do_not_depend_on_its_neighbours():
    """dq of a node's rows, and dk and dv of a leaf's, are those of the node's own sequence alone."""
    nodes = [Node(-1, 16, 0), Node(0, 6, 0), Node(0, 9, 0)]
    forest = Forest(7, heads=2, kv_heads=1, nodes=nodes, dtype=torch.float32, padding=0, shuffled=False)
    out, lse, dq, dk, dv, _ = run(forest)
    alone = Forest(7, heads=2, kv_heads=1, nodes=nodes[:2], dtype=torch.float32, padding=0, shuffled=False)
    alone.q, alone.grad, alone.k, alone.v = forest.q[:22], forest.grad[:22], forest.k[:25], forest.v[:25]
    got = run(alone)
    for actual, want in zip(got[:3], (out, lse, dq)):
        assert error(actual, want[:22]) < 1e-6
    for actual, want in zip(got[3:5], (dk, dv)):
        assert error(actual[16:22], want[16:22]) < 1e-6


def test_offsets_past_two_to_the_31():
    forest = Forest(8, heads=1, kv_heads=1, trees=1, depth=2, longest=3, dtype=torch.float32)
    want = run(forest)
    forest.k, forest.v = far_apart(forest.k), far_apart(forest.v)
    assert torch.equal(attention(forest.q, forest.k, forest.v, *forest.plan, 0.3, 0, 0.0)[0], want[0])
    forest.q, forest.grad = far_apart(forest.q), far_apart(forest.grad)
    for a, b in zip(run(forest), want):
        assert torch.equal(a, b)


def test_a_new_modifier_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "bent.py").write_text(textwrap.dedent(BENT))
    monkeypatch.setattr(modifiers, "__path__", [*modifiers.__path__, str(tmp_path)])
    modifiers.discover()
    parameters = torch.tensor([[0.3, 2.0], [0.1, 3.0]])

    def score(x, query, key, head):
        x = x + parameters[head, 0].double() * x.pow(3)
        return x.masked_fill((query - key) % parameters[head, 1].long() != 0, -math.inf)

    try:
        forest = Forest(9, heads=2, kv_heads=1, d=8, trees=1, depth=3, dtype=torch.float32)
        check(forest, 0, 2.0, (score, parameters))
    finally:
        monkeypatch.undo()
        modifiers.discover()


def test_bad_input_is_one_sentence():
    forest = Forest(10, trees=1, depth=2, dtype=torch.float32)
    offsets, starts, lengths, tables, page = forest.plan
    out, lse = attention(forest.q, forest.k, forest.v, *forest.plan, 0.3, 0, 0.0)
    tensors = forest.grad, forest.q, forest.k, forest.v, out, lse, offsets, starts, lengths
    with pytest.raises(ToolkitError, match="query_ranges is None; for gradients through block_tables"):
        attention_backward(*tensors, 0.3, 0, 0.0, tables, page)
    with pytest.raises(ToolkitError, match="query_ranges is of shape"):
        attention_backward(*tensors, 0.3, 0, 0.0, tables, page, query_ranges=forest.query_ranges[:1])
    wide = torch.empty(4, 1, 600)
    with pytest.raises(ToolkitError, match="values of width 600"):
        attention(wide, wide, wide, offsets, starts, lengths, None, 0, 0.3, 0, 0.0)


BENT = """
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
