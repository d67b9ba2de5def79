"""Triton attention backward in Triton's interpreter, against autograd through a dense fp64 oracle."""

import math

import pytest
import torch

from toolkit.ops.attention.triton import attention
from toolkit.ops.attention.triton_backward import attention_backward


def dense(q, k, v, offsets, kv_offsets, kv_lengths, scale, window, softcap):
    parts = []
    for s, length in enumerate(kv_lengths.tolist()):
        rows = slice(int(kv_offsets[s]), int(kv_offsets[s]) + length)
        queries = q[offsets[s] : offsets[s + 1]]
        position = length - queries.shape[0] + torch.arange(queries.shape[0])[:, None]
        key = torch.arange(length)[None, :]
        hidden = (key > position) | ((key <= position - window) if window > 0 else False)
        keys, values = (x[rows].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("nhd,khd->hnk", queries, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        parts.append(torch.einsum("hnk,khv->nhv", scores.masked_fill(hidden, -math.inf).softmax(-1), values))
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "v_dim", "window", "softcap"),
    [
        (1, 1, 16, 16, 0, 0.0),
        (6, 2, 20, 12, 0, 0.0),
        (4, 2, 16, 24, 7, 0.0),
        (2, 1, 8, 8, 20, 1.5),
        (18, 1, 8, 8, 0, 0.0),
    ],
)
def test_matches_autograd_through_dense_oracle(heads, kv_heads, d, v_dim, window, softcap):
    torch.manual_seed(heads * 100 + d)
    queries, past = [5, 1, 0, 18], [0, 17, 2, 1]
    if heads > 8:
        queries, past = [3, 0, 2, 1], [0, 1, 4, 0]
    lengths = [n + p for n, p in zip(queries, past)]
    offsets = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()])
    kv_lengths = torch.tensor(lengths)
    kv_offsets = torch.tensor([2 + sum(lengths[:i]) + 2 * i for i in range(4)])
    rows, tokens = sum(lengths) + 10, sum(queries)
    q, k, v = (
        torch.randn(tokens, heads, d),
        torch.randn(rows, kv_heads, d),
        torch.randn(rows, kv_heads, v_dim),
    )
    grad = torch.randn(tokens, heads, v_dim)
    scale = d**-0.5

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    dense(*exact, offsets, kv_offsets, kv_lengths, scale, window, softcap).backward(grad.double())
    owned = torch.zeros(rows, dtype=torch.bool)
    for at, length in zip(kv_offsets.tolist(), lengths):
        owned[at : at + length] = True
    k[~owned], v[~owned] = math.nan, math.nan
    out, lse = attention(q, k, v, offsets, kv_offsets, kv_lengths, None, 0, scale, window, softcap)
    got = attention_backward(grad, q, k, v, out, lse, offsets, kv_offsets, kv_lengths, scale, window, softcap)
    for value, expected in zip(got, exact):
        assert expected.grad is not None
        torch.testing.assert_close(value.double(), expected.grad, rtol=3e-5, atol=3e-5)
    assert (got[1][~owned] == 0).all()
    assert (got[2][~owned] == 0).all()


def test_padding_rows_and_strided_gradients():
    torch.manual_seed(0)
    q, k, v = torch.randn(9, 2, 16), torch.randn(6, 2, 16), torch.randn(6, 2, 16)
    offsets, kv_offsets, kv_lengths = torch.tensor([0, 6]), torch.tensor([0]), torch.tensor([6])
    out, lse = attention(q, k, v, offsets, kv_offsets, kv_lengths, None, 0, 0.25, 0, 0.0)
    grad = torch.randn(9, 16, 2).transpose(1, 2)
    dq, dk, dv, _ = attention_backward(grad, q, k, v, out, lse, offsets, kv_offsets, kv_lengths, 0.25, 0, 0.0)
    short = (grad[:6].contiguous(), q[:6], k, v, out[:6], lse[:6])
    again = attention_backward(*short, offsets, kv_offsets, kv_lengths, 0.25, 0, 0.0)
    assert (dq[6:] == 0).all()
    for value, expected in zip((dq[:6], dk, dv), again):
        assert torch.equal(value, expected)


def test_no_queries():
    empty = torch.empty(0, 2, 16)
    k = torch.randn(3, 2, 16)
    args = torch.tensor([0, 0]), torch.tensor([0]), torch.tensor([3])
    dq, dk, dv, _ = attention_backward(empty, empty, k, k, empty, torch.empty(0, 2), *args, 0.25, 0, 0.0)
    assert dq.shape == (0, 2, 16)
    assert (dk == 0).all()
    assert (dv == 0).all()


def test_sequences_that_share_rows():
    torch.manual_seed(1)
    q, k, v = torch.randn(7, 2, 8), torch.randn(21, 1, 8), torch.randn(21, 1, 8)
    args = torch.tensor([0, 3, 7]), torch.tensor([0, 2]), torch.tensor([18, 19])
    grad = torch.randn(7, 2, 8)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    dense(*exact, *args, 0.3, 0, 0.0).backward(grad.double())
    out, lse = attention(q, k, v, *args, None, 0, 0.3, 0, 0.0)
    for value, expected in zip(attention_backward(grad, q, k, v, out, lse, *args, 0.3, 0, 0.0), exact):
        assert expected.grad is not None
        torch.testing.assert_close(value.double(), expected.grad, rtol=3e-5, atol=3e-5)
