"""Rows that do not count: an upstream gradient of NaN or infinity, as a mean over no row has, reaches none of them."""

import pytest
import torch

from tests.helpers.rowwise import seeded
from toolkit.moe.balance import load_balancing_loss, load_metrics, router_z_loss, update_expert_bias
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
from toolkit.ops.linear_logprob import linear_logprob
from toolkit.ops.linear_logprob.deferred import DeferredLogits, summed_cross_entropy, token_statistics
from toolkit.ops.token_logprob import token_logprob
from toolkit.training.losses import group_advantages, next_token_loss, sequence_mean
from train_patches.trainer import LabelSmoother

SOME, NONE = torch.tensor([3, -100, 7, -100]), torch.full((4,), -100)
HALF_ROWS = torch.tensor([1.0, 1.0, 0.0, 0.0])


def weighted(x, w, y, impl):
    return linear_cross_entropy(x, w, y, row_weights=HALF_ROWS, impl=impl)


# A sum over rows of hidden states [4, 8] and a head [12, 8].
SUMS = {
    "linear_cross_entropy": lambda x, w, y, impl: linear_cross_entropy(x, w, y, impl=impl),
    "linear_cross_entropy, weighted": weighted,
    "linear_logprob": lambda x, w, y, impl: linear_logprob(x, w, y, impl=impl).logprob.sum(),
    "token_logprob": lambda x, w, y, impl: token_logprob(x @ w.T, y, impl=impl)[0].sum(),
}


def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    return [seeded(4, 8, dtype=dtype).requires_grad_(), seeded(12, 8, dtype=dtype, seed=1).requires_grad_()]


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_gradient_flows_where_nothing_counts(name, upstream, dtype, impl):
    """Below any upstream gradient. Where no row counts, the weight has no gradient either."""
    for targets in (SOME, NONE):
        hidden, weight = leaves(dtype)
        total = SUMS[name](hidden, weight, targets, impl.option)
        total.backward(torch.tensor(upstream, dtype=total.dtype))
        ignored = (targets == -100) | ((HALF_ROWS == 0) if "weighted" in name else (targets == -100))
        assert torch.equal(hidden.grad[ignored], torch.zeros_like(hidden.grad[ignored]))
        assert not hidden.grad[~ignored].isfinite().any()
        if ignored.all():
            assert torch.equal(weight.grad, torch.zeros_like(weight))


def deferred(x, w):
    return DeferredLogits(x, w, None)


def dense(x, w):
    return x @ w.T


@pytest.mark.parametrize("logits", [deferred, dense])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: summed_cross_entropy(z, NONE) / 0,
        lambda z: summed_cross_entropy(z / 2.0, NONE) / torch.tensor(0),
        lambda z: token_statistics(z, NONE)[0].mean() / 0,
        lambda z: next_token_loss(z, NONE),
        lambda z: next_token_loss(z, NONE, label_smoothing=0.1),
        lambda z: next_token_loss(z, NONE, z_loss=0.1),
        lambda z: LabelSmoother(0.1)((z[None],), NONE[None]),
        lambda z: LabelSmoother(0.1)((z[None],), NONE[None], shift_labels=True, num_items_in_batch=0),
    ],
)
def test_losses_without_a_label(loss, logits):
    parts = leaves(torch.float32)
    value = loss(logits(*parts))
    assert value == 0.0 or value.isnan()  # 0 / 0 where the peer's is
    for gradient in torch.autograd.grad(value, parts):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("rows", [0, 3])
def test_routers_without_a_token(rows):
    """No row, or rows of padding that no sample stands for."""
    logits = torch.randn(rows, 4, requires_grad=True)
    ids, multiplicity = torch.zeros(rows, 2, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    for loss in (load_balancing_loss([logits], [ids], multiplicity), router_z_loss([logits], multiplicity)):
        assert loss == 0.0
        assert not torch.autograd.grad(loss, logits)[0].any()
    assert load_metrics([torch.zeros(4)]) == {"expert_load_max": 0.0, "expert_load_entropy": 0.0}
    bias = torch.ones(4)
    update_expert_bias(bias, torch.zeros(4), 0.1)
    assert bias.tolist() == [1.0] * 4


def test_groups_and_completions_of_nothing():
    assert group_advantages(torch.tensor([[2.0], [5.0]])).tolist() == [[0.0], [0.0]]
    values = torch.zeros(0, requires_grad=True)
    assert torch.autograd.grad(sequence_mean(values, []).sum(), values)[0].shape == (0,)
    assert sequence_mean(torch.ones(2), [0, 2]).tolist() == [1.0, 1.0]
