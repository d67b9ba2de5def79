"""index_loss and attention_distribution against autograd of their dense formulas in float64."""

import pytest
import torch

from tests.helpers.prefix_trees import error
from tests.helpers.rowwise import seeded, threads
from tests.ops.test_sparse_attention import make_lists
from toolkit.ops import index_loss as module
from toolkit.ops.index_loss import attention_distribution, index_loss


def dense_loss(q, k, weights, rows, target, scale):
    """Row by row, over each row's list."""
    losses = []
    for t in range(q.shape[0]):
        own = rows[t][rows[t] >= 0]
        p = target[t][rows[t] >= 0].double()
        scores = (weights[t][:, None] * (q[t] @ k[own].T * scale).relu()).sum(0)
        losses.append((torch.xlogy(p, p) - p * scores.log_softmax(-1)).sum() if len(own) else scores.sum())
    return torch.stack(losses)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients(dtype, bound, monkeypatch):
    monkeypatch.setattr(module, "_GATHERED", 400)  # a few rows at a time
    rows = make_lists(13, 17, 40)
    attended = seeded(13, 6, 24), seeded(40, 2, 24, seed=1)
    target = attention_distribution(*attended, rows, 0.3)
    q, k, weights = (
        seeded(13, 3, 12, dtype=dtype),
        seeded(40, 12, dtype=dtype, seed=2),
        seeded(13, 3, dtype=dtype, seed=3),
    )
    leaves = [x.requires_grad_() for x in (q, k, weights)]
    upcast = [x.detach().double().requires_grad_() for x in leaves]
    want = dense_loss(*upcast, rows, target, 0.4)
    loss = index_loss(*leaves, rows, target.to(torch.promote_types(dtype, torch.float32)), 0.4)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert error(loss, want) < bound
    assert loss[1] == 0
    assert (loss > -1e-6).all()
    grad = seeded(13, seed=9)
    for actual, expected in zip(
        torch.autograd.grad(loss, leaves, grad.to(loss.dtype)), torch.autograd.grad(want, upcast, grad)
    ):
        assert error(actual, expected) < 2 * bound


def test_distribution_of_heads_over_the_listed_keys():
    rows = make_lists(9, 8, 20)
    q, k = seeded(9, 4, 16), seeded(20, 2, 16, seed=1)
    found = attention_distribution(q, k, rows)
    for t in range(9):
        own = rows[t][rows[t] >= 0]
        heads = [(k[own, h // 2] @ q[t, h] / 4).softmax(0) for h in range(4)]
        want = torch.stack(heads).mean(0) if len(own) else torch.zeros(0, dtype=torch.float64)
        assert error(found[t][: len(own)], want) < 1e-12
        assert not found[t][len(own) :].any()


def test_an_indexer_learns_what_attention_weighs():
    """A head's scores are differences of two ReLUs: four heads of an indexer can learn one head of attention."""
    rows = torch.arange(16).expand(12, 16).contiguous()
    target = attention_distribution(seeded(12, 1, 8) * 2, seeded(16, 1, 8, seed=1), rows)
    leaves = [x.requires_grad_() for x in (seeded(12, 4, 8, seed=4), seeded(16, 8, seed=5), seeded(12, 4, seed=6))]
    optimizer = torch.optim.Adam(leaves, 0.05)
    before = index_loss(*leaves, rows, target).sum()
    for _ in range(60):
        optimizer.zero_grad()
        index_loss(*leaves, rows, target).sum().backward()
        optimizer.step()
    assert index_loss(*leaves, rows, target).sum() < before / 10


def test_gradients_are_bitwise_repeatable():
    rows = make_lists(40, 64, 300)
    target = attention_distribution(seeded(40, 2, 8).float(), seeded(300, 1, 8).float(), rows)
    leaves = [x.float().requires_grad_() for x in (seeded(40, 4, 16), seeded(300, 16, seed=1), seeded(40, 4, seed=2))]
    found = []
    for count in (1, 2, 1):
        with threads(count):
            found.append(torch.autograd.grad(index_loss(*leaves, rows, target).sum(), leaves))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
