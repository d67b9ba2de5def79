"""sparse_attention against dense float64 attention with every key masked that is not listed: values and gradients."""

import pytest
import torch

from tests.helpers.implementations import (
    HALF,
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    impl_and_dtype,
    implementations,
    only_triton,
)
from tests.helpers.prefix_trees import error
from tests.helpers.rowwise import seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention
from toolkit.ops.sparse_attention import sparse_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

CASES = [(4, 2, 20, 12, True), (9, 1, 40, 32, False), (3, 3, 5, 3, False)]  # Hq, Hkv, D, Dv, whether there are sinks


def make_lists(rows, width, keys, seed=0):
    """[rows, width] different rows of keys each, some lists short, one empty."""
    generator = torch.Generator("cpu").manual_seed(seed)
    found = torch.full((rows, width), -1, device="cpu")
    for t in range(rows):
        count = 0 if t == 1 else int(torch.randint(1, width + 1, (1,), generator=generator, device="cpu"))
        found[t, :count] = torch.randperm(keys, generator=generator, device="cpu")[:count]
    return found.to(torch.get_default_device())


def dense(q, k, v, rows, scale, sinks=None):
    """Masked softmax over all keys, in the dtype given."""
    group = q.shape[1] // k.shape[1]
    listed = torch.zeros(q.shape[0], k.shape[0] + 1, dtype=torch.bool)
    listed.scatter_(1, torch.where(rows < 0, k.shape[0], rows), True)
    listed = listed[:, :-1]
    x = torch.einsum("thd,khd->thk", q, k.repeat_interleave(group, 1)) * scale
    x = x.masked_fill(~listed[:, None], -torch.inf)
    if sinks is not None:
        x = torch.cat([x, sinks[None, :, None].expand(*x.shape[:2], 1)], -1)
    empty = ~listed.any(-1)
    weights = x.masked_fill(empty[:, None, None], 0.0).softmax(-1).masked_fill(empty[:, None, None], 0.0)
    return torch.einsum("thk,khd->thd", weights[..., : k.shape[0]], v.repeat_interleave(group, 1))


@impl_and_dtype(implementations=[REFERENCE, NATIVE])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(impl, dtype, case):
    """Rows that nobody lists are NaN and get no gradient; a row without a list gives zeros."""
    check_forward_and_gradients(impl, dtype, *case)


@only_triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(CASES[0], torch.float32)]
    + [pytest.param(case, dtype, marks=pytest.mark.sweep) for case in CASES[1:] for dtype in TRITON.dtypes],
    ids=str,
)
def test_forward_and_gradients_in_triton(impl, dtype, case):
    check_forward_and_gradients(impl, dtype, *case)


def check_forward_and_gradients(impl, dtype, heads, kv_heads, depth, width, sunk):
    rows, keys, listed = (3, 9, 5) if SMALL and impl is TRITON else (21, 140, 97)
    lists = make_lists(rows, listed, keys - 3)
    q, grad = seeded(rows, heads, depth, dtype=dtype), seeded(rows, heads, width, dtype=dtype, seed=9)
    k, v = seeded(keys, kv_heads, depth, dtype=dtype, seed=1), seeded(keys, kv_heads, width, dtype=dtype, seed=2)
    k[-3:], v[-3:] = torch.nan, torch.nan
    sinks = seeded(heads, dtype=dtype, seed=3) if sunk else None
    leaves = [x.requires_grad_() for x in (q, k, v)] + ([sinks.requires_grad_()] if sunk else [])
    upcast = [x.detach().double().nan_to_num(0.0).requires_grad_() for x in leaves]
    want = dense(*upcast[:3], lists, 0.3, upcast[3] if sunk else None)
    wanted = torch.autograd.grad(want, upcast, grad.double())
    out, lse = sparse_attention(q, k, v, lists, 0.3, sinks)
    assert (out.dtype, lse.requires_grad) == (dtype, False)
    assert error(out, want) < TOLERANCE[dtype]
    assert not out[1].any()
    assert torch.equal(lse[1].isinf(), torch.full_like(lse[1], not sunk, dtype=torch.bool))
    grads = torch.autograd.grad(out, leaves, grad)
    for name, actual, expected in zip(("dq", "dk", "dv", "dsinks"), grads, wanted):
        assert error(actual, expected) < (1e-10 if dtype == torch.float64 else 6 * TOLERANCE[dtype]), name
    assert not grads[1][-3:].any()
    assert not grads[2][-3:].any()
    assert not grads[0][1].any()


def test_every_visible_key_is_dense_attention(impl):
    """Bitwise, also in the latents' form, whose values are the first columns of the keys."""
    n = 18 if SMALL and impl is TRITON else 90
    q, latents = seeded(n, 6, 24, dtype=torch.float32), seeded(n, 1, 24, dtype=torch.float32, seed=1)
    values = latents[..., :16]
    every = torch.arange(n).expand(n, n)
    lists = torch.where(every <= torch.arange(n)[:, None], every, -1)
    plan = torch.tensor([0, n]), torch.tensor([0]), torch.tensor([n])
    found, expected = sparse_attention(q, latents, values, lists), attention(q, latents, values, *plan)
    for actual, want in zip(found, expected):
        assert error(actual, want) < 1e-6 if impl is REFERENCE else torch.equal(actual, want)


def test_a_row_does_not_depend_on_its_neighbours(impl):
    """Forward and dq bit for bit over random parts; dk of a part is that of the part alone."""
    rows, keys = (4, 9) if SMALL and impl is TRITON else (33, 200)
    lists = make_lists(rows, min(keys, 25), keys)
    q, grad = seeded(rows, 4, 16, dtype=torch.float32), seeded(rows, 4, 8, dtype=torch.float32, seed=9)
    k, v = seeded(keys, 1, 16, dtype=torch.float32, seed=1), seeded(keys, 1, 8, dtype=torch.float32, seed=2)
    q.requires_grad_()
    out, lse = sparse_attention(q, k, v, lists)
    (dq,) = torch.autograd.grad(out, q, grad)
    for first, last in ((0, 1), (3, 4), (2, rows - 1)):
        part = q[first:last].detach().requires_grad_()
        got, got_lse = sparse_attention(part, k, v, lists[first:last])
        (got_dq,) = torch.autograd.grad(got, part, grad[first:last])
        pairs = ((got, out[first:last]), (got_lse, lse[first:last]), (got_dq, dq[first:last]))
        for actual, want in pairs:
            assert error(actual, want) < 1e-6 if impl is REFERENCE else torch.equal(actual, want)


@implementations(NATIVE)
def test_threads_change_no_bits(impl):
    lists = make_lists(40, 64, 500)
    leaves = [seeded(40, 4, 32, dtype=torch.float32), seeded(500, 2, 32, dtype=torch.float32, seed=1)]
    leaves = [x.requires_grad_() for x in [*leaves, seeded(500, 2, 16, dtype=torch.float32, seed=2)]]
    found = []
    for count in (1, 2, 3):
        with threads(count):
            out, _ = sparse_attention(*leaves, lists)
            found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_strided_and_expanded(impl):
    lists = make_lists(3, 4, 6)
    q, k, v = seeded(3, 2, 16), seeded(6, 2, 16, seed=1), seeded(6, 2, 8, seed=2)
    grad = seeded(1, 1, 8, seed=9).expand(3, 2, 8)
    found = []
    for views in ((q, k, v), [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]):
        leaves = [x.detach().requires_grad_() for x in views]
        out, _ = sparse_attention(*leaves, lists)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for actual, want in zip(*found):
        assert error(actual, want) < 1e-6 if impl is REFERENCE else torch.equal(actual, want)


def test_extreme_scores(impl):
    lists = make_lists(4, 6, 9)
    leaves = [x.requires_grad_() for x in (seeded(4, 2, 16) * 60, seeded(9, 1, 16, seed=1) * 60, seeded(9, 1, 8))]
    upcast = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = sparse_attention(*leaves, lists, 1.0)
    assert error(out, dense(*upcast, lists, 1.0)) < 2e-2
    for x in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        assert x.isfinite().all()


def test_nothing_listed_and_no_rows(impl):
    q, k, v = (seeded(*shape, dtype=HALF).requires_grad_() for shape in ((3, 2, 16), (5, 1, 16), (5, 1, 8)))
    for lists in (torch.full((3, 4), -1), torch.zeros(3, 0, dtype=torch.int64)):
        out, lse = sparse_attention(q, k, v, lists)
        assert not out.any()
        assert (lse == -torch.inf).all()
        assert not any(x.any() for x in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
    out, _ = sparse_attention(q[:0], k, v, lists[:0])
    assert out.shape == (0, 2, 8)


def test_errors_are_one_sentence(impl):
    q, k, v = seeded(3, 2, 16), seeded(5, 1, 16), seeded(5, 1, 8)
    with pytest.raises(ToolkitError, match=r"rows must have shape \[3, K\], got \[2, 4\]"):
        sparse_attention(q, k, v, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ToolkitError, match=r"sinks must have shape \[2\], one per query head, got \[3\]"):
        sparse_attention(q, k, v, torch.zeros(3, 4, dtype=torch.int64), sinks=torch.zeros(3))
    if impl is NATIVE:
        with pytest.raises(RuntimeError, match=r"rows\[0\] names row 5; k has 5 rows"):
            sparse_attention(q, k, v, torch.full((3, 1), 5))


def test_opcheck():
    q, k, v = (
        seeded(*shape, dtype=torch.float32, seed=at) for at, shape in enumerate([(5, 4, 8), (9, 2, 8), (9, 2, 6)])
    )
    sinks, lists = seeded(4, dtype=torch.float32, seed=3), make_lists(5, 4, 9)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    torch.library.opcheck(torch.ops.toolkit.sparse_attention.default, (*leaves[:3], lists, 0.3, sinks))
    q, k, v, sinks = (x.detach() for x in leaves)
    out, lse = sparse_attention(q, k, v, lists, 0.3, sinks)
    arguments = out, q, k, v, lists, out, lse, 0.3, sinks
    torch.library.opcheck(torch.ops.toolkit.sparse_attention_backward.default, arguments)
