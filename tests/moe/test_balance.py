"""Losses and metrics of routers, on random logits and inside a model over prefix trees."""

import copy
import math
import random

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import toolkit
from toolkit.errors import ToolkitError
from toolkit.moe.balance import (
    RouterStatistics,
    expert_load,
    load_balancing_loss,
    load_metrics,
    router_z_loss,
    update_expert_bias,
)
from toolkit.moe.observer import observing
from toolkit.patching.forward import ragged_forward
from toolkit.state.batch import RaggedBatch
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager, lifted_to_double


def sequences_with_a_prefix(seed: int) -> list[list[int]]:
    source = random.Random(seed)

    def text(count: int) -> list[int]:
        return [source.randrange(3, 300) for _ in range(count)]

    prompt = text(20)
    branch = prompt + text(4)
    return [prompt + text(5), branch + text(3), branch + text(9), branch, text(3)]


@pytest.mark.parametrize(("tokens", "experts", "k", "layers"), [(13, 5, 1, 3), (1, 4, 4, 1), (40, 8, 3, 2)])
def test_losses_are_those_of_the_repeated_tokens(tokens: int, experts: int, k: int, layers: int) -> None:
    """A token that stands for m samples counts m times: transformers' own function on the tokens repeated."""
    generator = torch.Generator().manual_seed(tokens)
    multiplicity = torch.randint(1, 5, (tokens,), generator=generator)
    logits = [
        torch.randn(tokens, experts, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
        for _ in range(layers)
    ]
    ids = [layer.topk(k).indices for layer in logits]
    repeated = [layer.repeat_interleave(multiplicity, 0) for layer in logits]
    with lifted_to_double():
        balance = load_balancing_loss_func(tuple(repeated), experts, k)
    z_loss = torch.cat(repeated).exp().sum(-1).log().square().mean()
    got = load_balancing_loss(logits, ids, multiplicity), router_z_loss(logits, multiplicity)
    for ours, exact in zip(got, (balance, z_loss)):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
        slopes = [torch.autograd.grad(one, logits, retain_graph=True) for one in (ours, exact)]
        for mine, wanted in zip(*slopes):
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-14)
    alone = load_balancing_loss(repeated, [layer.topk(k).indices for layer in repeated])
    torch.testing.assert_close(alone, balance, rtol=1e-12, atol=0)


def test_even_loads_give_k_and_half_precision_is_computed_in_float32() -> None:
    logits = torch.zeros(8, 4, dtype=torch.bfloat16)
    ids = (torch.arange(8)[:, None] + torch.tensor([0, 2])) % 4
    loss = load_balancing_loss([logits], [ids])
    assert loss.dtype == torch.float32
    assert loss.item() == 2.0
    assert router_z_loss([logits]).item() == pytest.approx(math.log(4) ** 2)
    huge = torch.tensor([[3e38, -3e38]])
    assert load_balancing_loss([huge], [torch.tensor([[0]])]).item() == 2.0
    assert router_z_loss([torch.tensor([[1e4, -1e4]])]).item() == 1e8


def test_layers_with_other_numbers_of_experts_are_refused() -> None:
    with pytest.raises(ToolkitError, match=r"needs layers with equally many experts, got \[3, 4\]"):
        load_balancing_loss([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2, 1).long()] * 2)


def test_loads_expert_biases_and_metrics() -> None:
    ids = torch.tensor([[0, 1], [0, 4], [3, 0]])  # 4: a skipped pair
    assert expert_load(ids, 4).tolist() == [3.0, 1.0, 0.0, 1.0]
    assert expert_load(ids, 4, torch.tensor([2, 1, 5])).tolist() == [8.0, 2.0, 0.0, 5.0]
    assert expert_load(ids[:0], 4).tolist() == [0.0] * 4
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
    update_expert_bias(bias, torch.tensor([3.0, 1.0, 0.0, 0.0]), 0.125)
    assert bias.tolist() == [0.375, 0.0, 0.125, 0.125]
    even, uneven = torch.full((4,), 7.0), torch.tensor([6.0, 2.0, 0.0, 0.0])
    assert load_metrics([even]) == {"expert_load_max": 1.0, "expert_load_entropy": pytest.approx(1.0)}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    metrics = load_metrics([even, uneven])
    assert metrics == {"expert_load_max": 3.0, "expert_load_entropy": pytest.approx((1 + entropy) / 2)}
    assert load_metrics([torch.tensor([9.0])])["expert_load_max"] == 1.0


def routed(model: torch.nn.Module, sequences: list[list[int]], share: bool) -> tuple[torch.Tensor, RouterStatistics]:
    """The log-probabilities' sum, and what the routers did."""
    statistics = RouterStatistics()
    with observing(statistics):
        total = torch.cat(toolkit.token_logprobs(model, sequences, share=share)).sum()
    return total, statistics


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], limit: float) -> None:
    assert set(left) == set(right)
    for name, gradient in right.items():
        assert (left[name] - gradient).norm() <= limit * gradient.norm() + 1e-300, name


def test_prefix_trees_have_the_losses_of_their_sequences_alone() -> None:
    """Against transformers' own model and function on every unshared sequence, in float64, with all gradients."""
    stock = eager(random_model("qwen3_moe", layers=3).double())
    model = copy.deepcopy(stock)
    toolkit.patch(model)
    sequences = sequences_with_a_prefix(0)
    with lifted_to_double():
        assert RaggedBatch.from_sequences(sequences).multiplicity is not None
        seen = [stock(torch.tensor([one]), output_router_logits=True, use_cache=False) for one in sequences]
        logits = tuple(torch.cat(layer) for layer in zip(*(one.router_logits for one in seen)))
        each = [load_balancing_loss_func((one,), stock.config.num_experts, 3) for one in logits]
        exact = torch.stack(each).mean()
        z_exact = torch.stack([layer.logsumexp(-1).square().mean() for layer in logits]).mean()
        wanted = gradients(stock, 0.7 * exact + 0.3 * z_exact)
        loads = []
        for share in (True, False):
            _, statistics = routed(model, sequences, share)
            balance, z_loss = statistics.take_losses()
            torch.testing.assert_close(balance, exact, rtol=1e-10, atol=0)
            torch.testing.assert_close(z_loss, z_exact, rtol=1e-10, atol=0)
            close(gradients(model, 0.7 * balance + 0.3 * z_loss), wanted, 1e-10)
            loads.append(statistics.take_loads())
    assert list(loads[0]) == [0, 1, 2]
    assert all(torch.equal(loads[0][layer], loads[1][layer]) for layer in range(3))
    assert all(load.sum() == 3 * sum(map(len, sequences)) for load in loads[0].values())


def test_activation_checkpointing_changes_nothing() -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    sequences = sequences_with_a_prefix(1)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        total, statistics = routed(model, sequences, True)
        balance, z_loss = statistics.take_losses()
        found.append(gradients(model, total + balance + z_loss))
        loads = statistics.take_loads()  # layers that ran again were not counted again
        assert all(load.sum() == 3 * sum(map(len, sequences)) for load in loads.values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_reentrant_checkpoint_is_refused() -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with pytest.raises(ToolkitError, match="use_reentrant=False"):
        routed(model, sequences_with_a_prefix(1), True)


def test_what_is_not_watched_is_not_counted() -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    batch = RaggedBatch.from_sequences([[5, 6, 7]])
    outer, inner = RouterStatistics(losses=False), RouterStatistics(losses=False)
    with observing(outer), torch.no_grad():
        ragged_forward(model, batch)  # the first forward also checks the patch, unseen
        with observing(inner):
            ragged_forward(model, batch)
        with observing(None):
            ragged_forward(model, batch)
    ragged_forward(model, batch)
    assert [load.sum().item() for load in outer.take_loads().values()] == [9.0, 9.0]
    assert [load.sum().item() for load in inner.take_loads().values()] == [9.0, 9.0]
    assert outer.take_loads() == {}


def test_losses_are_taken_once_a_forward() -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    _, statistics = routed(model, [[4, 5]], True)
    with pytest.raises(ToolkitError, match="layer 0 ran twice"), observing(statistics):
        toolkit.token_logprobs(model, [[4, 5]])
    statistics.take_losses()
    with pytest.raises(ToolkitError, match="no router of the model was observed"):
        statistics.take_losses()
