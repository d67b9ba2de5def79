"""Attention's sinks, score and mask functions: against dense float64 attention, and their bits."""

import itertools
import math
import runpy
from pathlib import Path

import pytest
import setuptools
import torch

from tests.helpers.prefix_trees import ORACLES, SLOPES, Node, PrefixTrees, error
from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention, attention_backward, modifiers
from toolkit.ops.registry import has_native

needs_native = pytest.mark.skipif(not has_native("attention"), reason="the native CPU library is not built")
IMPLS = ["reference", pytest.param("cpu", marks=needs_native)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def test_every_modifier_has_an_oracle():
    assert {"", *modifiers.MODIFIERS} == set(ORACLES)


@pytest.mark.parametrize("name", [name for name, one in modifiers.MODIFIERS.items() if one.first is not None])
def test_no_key_below_the_bound_is_visible(name):
    one, parameters = modifiers.MODIFIERS[name], ORACLES[name][1]
    query, key = torch.arange(60)[:, None], torch.arange(60)[None]
    for own in parameters:
        bound = one.first(query, *own)
        seen = one.visible(query, key, *own) & (key <= query)
        assert not (seen & (key < bound)).any()
        assert (bound.diff(dim=0) >= 0).all()
        assert (bound > 0).any() or own[0] >= 60


def check(trees, modifier, sinks, window, softcap, impl):
    score, parameters = ORACLES[modifier]
    dtype = trees.q.dtype
    upcast = [x.double().requires_grad_() for x in (trees.q, trees.k, trees.v)]
    upcast += [] if sinks is None else [sinks.double().requires_grad_()]
    expected, expected_lse = trees.dense(
        *upcast[:3], 0.4, window, softcap, upcast[3] if sinks is not None else None, score
    )
    wanted = torch.autograd.grad(expected, upcast, trees.grad.double())
    options = {"sinks": sinks, "modifier": modifier, "parameters": parameters, "impl": impl}
    leaves = [x.clone().requires_grad_() for x in (trees.q, trees.k, trees.v)]
    if sinks is not None:
        options["sinks"] = sinks.clone().requires_grad_()
        leaves.append(options["sinks"])
    out, lse = attention(*leaves[:3], *trees.plan, 0.4, window, softcap, **options)
    end = int(trees.query_offsets[-1])
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(lse[:end], expected_lse[:end]) < TOLERANCE[dtype]
    assert (lse[end:] == -math.inf).all()
    assert (out[end:] == 0).all()
    for actual, want in zip(torch.autograd.grad(out, leaves, trees.grad), wanted, strict=True):
        assert error(actual, want) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("modifier", list(ORACLES))
@pytest.mark.parametrize("sunk", [False, True])
def test_forward_and_gradients(modifier, sunk, dtype, impl):
    sinks = torch.tensor([0.3, 6.0, -40.0, 40.0]).to(dtype) if sunk else None
    for seed, window, softcap, page in ((0, 0, 0.0, 1), (1, 9, 0.0, 4), (2, 0, 2.0, 16)):
        trees = PrefixTrees(seed, heads=4, kv_heads=2, d=12, page=page, longest=12, dtype=dtype)
        check(trees, modifier, sinks, window, softcap, impl)
    long = PrefixTrees(3, heads=4, kv_heads=2, d=16, dtype=dtype, nodes=[Node(-1, 150, 9), Node(0, 80, 0)])
    check(long, modifier, sinks, 0, 3.0, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_without_keys(impl):
    """Zeros and the sink as lse; with no sinks, or one of -inf, -inf. Their gradients are zeros."""
    q, k, v, grad = (torch.randn(n, 2, 4, dtype=torch.float64) for n in (9, 3, 3, 9))
    plan = torch.tensor([0, 5, 7]), torch.tensor([0, 0]), torch.tensor([3, 0])
    sinks = torch.tensor([1.5, -math.inf], dtype=torch.float64)
    out, lse = attention(q, k, v, *plan, sinks=sinks, impl=impl)
    blind = [0, 1, 5, 6]
    assert (out[[*blind, 7, 8]] == 0).all()
    assert lse[blind].tolist() == [[1.5, -math.inf]] * 4
    assert (lse[7:] == -math.inf).all()
    dq, dk, dv, dsinks = attention_backward(grad, q, k, v, out, lse, *plan, 0.5, sinks=sinks, impl=impl)
    assert all(x.isfinite().all() for x in (dq, dk, dv, dsinks))
    assert (dq[[*blind, 7, 8]] == 0).all()
    assert dsinks[0] != 0
    assert dsinks[1] == 0
    plain = attention(q, k, v, *plan, impl=impl)
    assert error(out[:, 1], plain[0][:, 1]) < 1e-15


@pytest.mark.parametrize("impl", IMPLS)
def test_a_modifier_that_leaves_one_key_or_none(impl):
    q, k, v, grad = (torch.randn(70, 1, 8, dtype=torch.float64) for _ in range(4))
    plan = torch.tensor([0, 70]), torch.tensor([0]), torch.tensor([70])
    for sinks in (None, torch.zeros(1, dtype=torch.float64)):
        steep = {"sinks": sinks, "modifier": "alibi", "parameters": torch.full((1, 1), 1e30)}
        out, lse = attention(q, k, v, *plan, impl=impl, **steep)
        grads = attention_backward(grad, q, k, v, out, lse, *plan, 8**-0.5, impl=impl, **steep)
        assert all(x.isfinite().all() for x in (out, lse, *grads))
        if sinks is None:
            assert torch.equal(out, v)
        if impl == "cpu":  # no key is in a chunk that is not a number
            none = {"sinks": sinks, "modifier": "chunked", "parameters": torch.full((1, 1), math.nan)}
            out, lse = attention(q, k, v, *plan, impl=impl, **none)
            assert (out == 0).all()
            assert (lse == (-math.inf if sinks is None else 0.0)).all()
            for x in attention_backward(grad, q, k, v, out, lse, *plan, 8**-0.5, impl=impl, **none):
                assert (x == 0).all()


@needs_native
@pytest.mark.parametrize("modifier", list(ORACLES))
def test_bits_do_not_depend_on_chunks_pages_or_threads(modifier):
    rows, parameters = 140, ORACLES[modifier][1]
    q, k, v, grad = (torch.randn(rows, h, 16) for h in (4, 2, 2, 4))
    sinks = torch.randn(4)
    options = {"sinks": sinks, "modifier": modifier, "parameters": parameters}
    plan = torch.tensor([0, rows]), torch.tensor([0]), torch.tensor([rows])
    expected = attention(q, k, v, *plan, **options)
    index = torch.randperm(rows + 5)[:rows]
    far = [torch.full((rows + 5, 2, 16), math.nan).index_copy(0, index, x) for x in (k, v)]
    threads = torch.get_num_threads()
    try:
        for count, cuts in ((1, [0, 1, 5, 64, 65, 139, 140]), (2, [0, 70, 71, 72, 140])):
            torch.set_num_threads(count)
            for begin, end in itertools.pairwise(cuts):
                part = torch.tensor([0, end - begin]), torch.tensor([0]), torch.tensor([end])
                got = attention(q[begin:end], *far, *part, index[None, :end], 1, **options)
                assert torch.equal(got[0], expected[0][begin:end])
                assert torch.equal(got[1], expected[1][begin:end])
        grads = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grads.append(attention_backward(grad, q, k, v, *expected, *plan, 0.25, **options))
        for other in grads[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, grads[0]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [0, 5])
def test_sinks_of_gpt_oss(impl, window):
    """transformers' own eager attention, forward and every gradient."""
    eager = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss").eager_attention_forward
    n, heads, kv_heads, d = 23, 4, 2, 8
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = heads // kv_heads, True
    module.sinks = torch.nn.Parameter(torch.randn(heads, dtype=torch.float64))
    leaves = [torch.randn(n, h, d, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    index = torch.arange(n)
    hidden = (index[None] > index[:, None]) | ((index[None] <= index[:, None] - window) if window else False)
    mask = torch.zeros(n, n, dtype=torch.float64).masked_fill(hidden, -math.inf)[None, None]
    expected = eager(module, *(x.transpose(0, 1)[None] for x in leaves), mask, d**-0.5)[0][0]
    plan = torch.tensor([0, n]), torch.tensor([0]), torch.tensor([n])
    out, _ = attention(*leaves, *plan, window=window, sinks=module.sinks, impl=impl)
    assert error(out, expected) < 1e-12
    grad, own = torch.randn_like(out), [*leaves, module.sinks]
    for actual, want in zip(torch.autograd.grad(out, own, grad), torch.autograd.grad(expected, own, grad)):
        assert error(actual, want) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_sinks_and_parameters_of_other_dtypes(impl):
    """Those of a bfloat16 model: upcast; the gradient is in the dtype of the sinks."""
    q, k, v = (torch.randn(20, 4, 8).bfloat16() for _ in range(3))
    plan = torch.tensor([0, 20]), torch.tensor([0]), torch.tensor([20])
    sinks = torch.randn(4).bfloat16().requires_grad_()
    out, _ = attention(q, k, v, *plan, sinks=sinks, modifier="alibi", parameters=SLOPES.double(), impl=impl)
    upcast = sinks.detach().float().requires_grad_()
    want, _ = attention(q, k, v, *plan, sinks=upcast, modifier="alibi", parameters=SLOPES, impl=impl)
    assert torch.equal(out, want)
    (got,), (expected,) = (torch.autograd.grad(y.float().square().sum(), x) for y, x in ((out, sinks), (want, upcast)))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected.bfloat16())


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_far_from_the_start(impl):
    """Positions near 2^24, where quotients in float32 round: as whole numbers have it."""
    size = 3
    past = 2**24 - 64
    keys = torch.arange(past, past + 60)
    expected = keys[:, None] // size == keys[None] // size
    modifier = modifiers.find("chunked")
    assert modifier is not None
    assert torch.equal(modifier.visible(keys[:, None], keys[None], torch.tensor(float(size))), expected)
    if impl == "reference":
        return
    # One key is visible far out: the table's other entries are not read under a window.
    n = past + 4
    q, k, v = torch.randn(1, 1, 8), torch.randn(8, 1, 8), torch.randn(8, 1, 8)
    tables = torch.zeros(1, n // 8 + 1, dtype=torch.int64)
    plan = torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([n])
    out, _ = attention(q, k, v, *plan, tables, 8, 1.0, 6, modifier="chunked", parameters=torch.tensor([[3.0]]))
    seen = [j for j in range(n - 6, n) if j // 3 == (n - 1) // 3]
    weights = (q[0, 0] @ k[[j % 8 for j in seen], 0].T).softmax(-1)
    assert error(out[0, 0], weights @ v[[j % 8 for j in seen], 0]) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modifier": "alibbi"}, r"modifier must be one of alibi, chunked, got 'alibbi'; did you mean 'alibi'"),
        ({"modifier": "alibi"}, r"parameters of modifier 'alibi' must have shape \[4, 1\], got None"),
        (
            {"modifier": "alibi", "parameters": torch.ones(2, 1)},
            r"parameters of .* \[4, 1\], got shape \[2, 1\]",
        ),
        ({"parameters": torch.ones(4, 1)}, r"modifier '' must be None"),
        ({"sinks": torch.ones(3)}, r"sinks must have shape \[4\], one per query head, got \[3\]"),
    ],
)
def test_bad_input(options, message, impl):
    q, one = torch.ones(3, 4, 8), torch.tensor([3])
    with pytest.raises(ToolkitError, match=message):
        attention(q, q, q, torch.tensor([0, 3]), one * 0, one, impl=impl, **options)


def test_operator_registration():
    trees = PrefixTrees(10, trees=1, depth=2, longest=4)
    leaves = [x.nan_to_num(0).requires_grad_() for x in (trees.q, trees.k, trees.v)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    options = sinks, "alibi", SLOPES.double(), trees.query_ranges
    torch.library.opcheck(torch.ops.toolkit.attention.default, (*leaves, *trees.plan, 0.3, 0, 0.0, *options))
    compiled = torch.compile(
        lambda *x: attention(*x, *trees.plan, 0.3, 0, 0.0, *options)[0].sin(), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*leaves), attention(*leaves, *trees.plan, 0.3, 0, 0.0, *options)[0].sin())


def test_a_new_modifier_is_one_file(tmp_path, monkeypatch):
    """Its torch functions serve the reference, its C++ reaches the build; for Triton see test_attention_trees.py."""
    (tmp_path / "arched.py").write_text(ARCHED)
    monkeypatch.setattr(modifiers, "__path__", [*modifiers.__path__, str(tmp_path)])
    modifiers.discover()
    try:
        trees = PrefixTrees(11, heads=2, kv_heads=1, d=8, trees=1, depth=3)
        parameters = torch.tensor([[0.3, 2.0], [0.1, 3.0]], dtype=torch.float64)

        def score(x, query, key, head):
            x = x + parameters[head, 0] * x.pow(3)
            return x.masked_fill((query - key) % parameters[head, 1].long() != 0, -math.inf)

        leaves = [x.clone().requires_grad_() for x in (trees.q, trees.k, trees.v)]
        want = trees.dense(*leaves, 0.3, score=score)[0]
        options = {"modifier": "arched", "parameters": parameters, "impl": "reference"}
        out, lse = attention(*(x.detach() for x in leaves), *trees.plan, 0.3, **options)
        assert error(out, want) < 1e-12
        offsets, starts, lengths, tables, page = trees.plan
        tensors = trees.grad, trees.q, trees.k, trees.v, out, lse, offsets, starts, lengths
        grads = attention_backward(*tensors, 0.3, 0, 0.0, tables, page, **options)
        for actual, wanted in zip(grads, torch.autograd.grad(want, leaves, trees.grad)):
            assert error(actual, wanted) < 1e-11
        (tmp_path / "broken.py").write_text("def value(x):\n    return x\n")
        with pytest.raises(ToolkitError, match="attention modifier 'broken'"):
            modifiers.discover()
    finally:
        monkeypatch.undo()
        modifiers.discover()
    assert "arched" not in modifiers.MODIFIERS
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    make = runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))["modifier_header"]
    with pytest.raises(RuntimeError, match=r"arched\.py has no C\+\+ functor beside it"):
        make(tmp_path)
    (tmp_path / "arched.h").touch()
    with pytest.raises(RuntimeError, match=r"broken\.py must have functions score or visible"):
        make(tmp_path)
    (tmp_path / "broken.py").unlink()
    header = make(tmp_path)
    assert f'#include "{tmp_path / "arched.h"}"' in header
    assert "static_assert(Modifier_arched::kScores == true && Modifier_arched::kMasks == true" in header
    assert "Modifier_arched::kParameters == 2," in header
    assert 'if (modifier == "arched") return body(Modifier_arched{});' in header


ARCHED = """
import torch


def score(s, query, key, amount, step):
    return s + amount * s**3


def derivative(s, query, key, amount, step):
    return 1 + 3 * amount * s * s


def visible(query, key, amount, step):
    return (query - key) % step.long() == 0

"""
