"""Routers that normalise and scale hidden states first, and weigh each expert by a number of its (Gemma 4)."""

import copy

import pytest
import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

import toolkit
from toolkit import Engine, SamplingParams
from toolkit.testing.architectures import small_model
from toolkit.testing.oracle import eager

MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}


def model_of():
    model = small_model("gemma4_text", **MOE)
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in model.model.layers:
            for vector in (layer.router.scale, layer.router.per_expert_scale):
                vector.uniform_(0.5, 2.0, generator=source)
            layer.router.proj.weight.normal_(0.0, 1.0, generator=source)
    return model


def routers(report):
    return [claim.op for claim in report.claims if claim.role == "router"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_claimed_and_returns_what_its_class_does(dtype):
    model = model_of().to(dtype)
    router = model.model.layers[0].router
    x = torch.randn(40, router.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = router(x)
    report = toolkit.patch(model)
    assert routers(report) == ["route (softmax, top 2, normalised)"] * model.config.num_hidden_layers
    got = router(x)
    assert [one.dtype for one in got] == [one.dtype for one in expected]
    if dtype == torch.float32:
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_loss_and_gradients_are_those_of_stock():
    model = model_of()
    stock, ids = eager(copy.deepcopy(model)), torch.arange(3, 51).view(2, 24)
    toolkit.patch(model)
    losses = [one(ids, labels=ids, use_cache=False).loss for one in (stock, model)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - expected[name].grad).norm()
            assert error <= 1e-4 * expected[name].grad.norm().clamp_min(1e-4), name
    assert all(layer.router.per_expert_scale.grad.abs().max() > 0 for layer in model.model.layers)


def test_routing_is_replayed_with_the_engines_bits():
    model, prompt = model_of(), list(range(20, 45))
    toolkit.patch(model)
    with Engine(model, max_num_seqs=2, enable_return_routed_experts=True) as engine:
        (found,) = engine.generate([prompt], SamplingParams(max_tokens=9, seed=3, ignore_eos=True))
    assert found.routed_experts.shape[1:] == (model.config.num_hidden_layers, 2)
    with torch.no_grad():
        (got,) = toolkit.token_logprobs(model, [prompt + found.token_ids], routing=[found.routed_experts])
    assert got[-9:].tolist() == found.logprobs


class Squared(Gemma4TextRouter):
    def forward(self, hidden_states):
        scores, weights, ids = super().forward(hidden_states)
        return scores, weights * self.per_expert_scale[ids], ids


class Shifted(Gemma4TextRouter):
    def forward(self, hidden_states):
        return super().forward(hidden_states + 1.0)


@pytest.mark.parametrize("other", [Squared, Shifted])
def test_another_router_keeps_its_forward(other):
    model = model_of()
    for layer in model.model.layers:
        layer.router.__class__ = other
    assert routers(toolkit.patch(model)) == []
