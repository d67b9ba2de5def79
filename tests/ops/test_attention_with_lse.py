"""The log-sum-exp of attention, with its gradient, and biases by distance that two sets of keys are put together by."""

import pytest
import torch

from toolkit.ops.attention.with_lse import attention_with_lse
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings
from toolkit.state.dense import DenseContext

LENGTHS = (13, 4, 1)


def tensors(*shapes, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(LENGTHS), *shape, generator=source).double().requires_grad_() for shape in shapes]


def dense(q, k, v, scale, window, bias=None, sinks=None):
    """Outputs and log-sum-exps of each sequence alone, by torch."""
    outputs, logs, first = [], [], 0
    for length in LENGTHS:
        rows = slice(first, first + length)
        first += length
        keys, values = (one[rows].repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * scale
        back = torch.arange(length)[:, None] - torch.arange(length)
        if bias is not None:
            extent = bias.shape[-1]
            of_keys = bias[rows].transpose(0, 1).gather(-1, back.clamp(0, extent - 1).expand_as(scores))
            scores = scores + of_keys.masked_fill(back >= extent, 0.0)
        scores = scores.masked_fill((back < 0) | (back >= window if window else back < 0), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[rows].T[..., None]], -1)
        logs.append(scores.logsumexp(-1).T)
        weights = scores.softmax(-1)[..., :length]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs), torch.cat(logs)


@pytest.mark.parametrize("window", [0, 3])
def test_gradients_through_output_and_log_sum_exp(window):
    q, k, v = tensors((4, 6), (2, 6), (2, 5))
    batch = RaggedBatch.from_sequences([[0] * length for length in LENGTHS], share=False)
    plan = batch.query_offsets, batch.kv_offsets, batch.kv_lengths, None, 1
    found = []
    for out, lse in (attention_with_lse(q, k, v, plan, 0.4, window), dense(q, k, v, 0.4, window)):
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + (lse.double() ** 2).sum()
        found.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("window", "extent"), [(0, 3), (0, 20), (5, 5), (3, 5), (7, 3)])
@pytest.mark.parametrize("with_sinks", [True, False])
def test_biases_by_distance(window, extent, with_sinks):
    """Beyond the extent there is no bias; with a window inside of it, equal to it and beyond it."""
    q, k, v, bias, sinks = tensors((4, 6), (2, 6), (2, 5), (4, extent), (4,))
    given = (q, k, v, bias, sinks) if with_sinks else (q, k, v, bias)
    own_sinks = sinks if with_sinks else None
    context = DenseContext(RaggedBatch.from_sequences([[0] * length for length in LENGTHS], share=False))
    got = context.attend_biased(0, q, k, v, AttentionSettings(0.4, window), bias, own_sinks)
    expected, _ = dense(q, k, v, 0.4, window, bias, own_sinks)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    gradients = [torch.autograd.grad((one * weights).sum(), given) for one in (got, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
