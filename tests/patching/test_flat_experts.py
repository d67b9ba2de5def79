"""Layers that route themselves to experts in flat matrices (DBRX): routing and experts, against stock."""

import copy

import pytest
import torch
from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU, DbrxExperts, DbrxFFN

import toolkit
from tests.helpers.routed_completions import greedy_with_experts
from toolkit.errors import ToolkitError
from toolkit.testing.architectures import small_model
from toolkit.testing.oracle import eager
from toolkit.testing.parity import check_parity

NORMS = {"normalised": 1.0, "no norm": None, "normalised by squares": 2.0}


def model_of(norm=1.0, top_k=2, **settings):
    """A small model whose weights are as large as those of a trained one, so that its tokens are told apart."""
    ffn = {"moe_num_experts": 6, "moe_top_k": top_k, "ffn_hidden_size": 40, "moe_normalize_expert_weights": norm}
    model = small_model("dbrx", ffn_config={**ffn, **settings})
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15, generator=source)
    return model


def layers(model):
    return [block.ffn for block in model.transformer.blocks]


def sequences(*lengths):
    source = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (length,), generator=source).tolist() for length in lengths]


@pytest.mark.parametrize("words", NORMS)
def test_values_and_gradients_are_those_of_stock_in_float64(words):
    model, ids = model_of(NORMS[words]), torch.tensor(sequences(24, 24))
    exact, names = eager(copy.deepcopy(model)).double(), list(model.state_dict())
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    report = toolkit.patch(model)
    assert {claim.op for claim in report.claims if claim.role == "router"} == {f"route (softmax, top 2, {words})"}
    assert report.roles()["router"] == report.roles()["experts"] == len(layers(model))
    assert list(model.state_dict()) == names
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    found = [one(ids, labels=ids, use_cache=False) for one in (exact, model)]
    torch.testing.assert_close(found[1].logits.double(), found[0].logits, rtol=1e-4, atol=1e-5)
    for one in found:
        one.loss.backward()
    expected = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        error = (parameter.grad.double() - expected[name].grad).norm()
        assert error <= 1e-4 * expected[name].grad.norm().clamp_min(1e-4), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_differs_between_engine_and_training(dtype):
    model = model_of(2.0).to(dtype)
    assert check_parity(model, sequences(5, 30, 17), min_tokens=120).differing == 0
    assert toolkit.patch(model).roles()["router"] == len(layers(model))


def test_greedy_tokens_are_those_of_generate_and_routing_is_returned_and_replayed():
    model, chosen = model_of(), []
    (prompt,) = sequences(20)
    for layer in layers(model):
        layer.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        chosen.clear()
        model(expected[:, :-1], use_cache=False)
    stock = torch.stack(chosen, 1).sort(-1).values
    toolkit.patch(model)
    found = greedy_with_experts(model, prompt, 10)
    whole = prompt + found.token_ids
    assert whole == expected[0].tolist()
    routed = torch.as_tensor(found.routed_experts)
    assert torch.equal(routed.sort(-1).values.long(), stock)
    with torch.no_grad():
        (got,) = toolkit.token_logprobs(model, [whole[:-1]], routing=[found.routed_experts])
        (other,) = toolkit.token_logprobs(model, [whole[:-1]], routing=[(found.routed_experts + 1) % 6])
    assert got[-len(found.logprobs) + 1 :].tolist() == found.logprobs[:-1]
    assert not torch.equal(got, other)


def test_jitter_in_training_is_the_routers_own():
    model, ids = model_of(moe_jitter_eps=0.1), torch.tensor(sequences(9))
    stock = eager(copy.deepcopy(model)).train()
    assert toolkit.patch(model).roles()["router"] == len(layers(model))
    losses = []
    for one in (stock, model.train()):
        torch.manual_seed(0)
        losses.append(one(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for one, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_another_setting_after_the_patch_is_an_error_and_hooks_see_the_calls():
    model, ids, seen = model_of(), torch.tensor(sequences(9)), []
    toolkit.patch(model)
    with torch.no_grad():
        expected = model(ids).logits
        hook = layers(model)[0].experts.mlp.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert seen
        hook.remove()
        layers(model)[0].top_k = 1
        with pytest.raises(ToolkitError, match="top_k of DbrxFFN must be 2"):
            model(ids)
        layers(model)[0].top_k = 2
        layers(model)[1].experts.mlp.activation_fn = torch.nn.GELU()
        with pytest.raises(ToolkitError, match=r"mlp\.activation_fn"):
            model(ids)


class Sharper(DbrxFFN):
    def route_tokens_to_experts(self, router_logits):
        return super().route_tokens_to_experts(2 * router_logits)


class Doubled(DbrxExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, 2 * top_k_weights)


class Shifted(DbrxExpertGLU):
    def forward(self, x, expert_w1, expert_v1, expert_w2):
        return super().forward(x, expert_w1, expert_v1, expert_w2) + x


@pytest.mark.parametrize("other", [Sharper, Doubled, Shifted])
def test_another_layer_keeps_its_forward(other):
    model, role = model_of(), "router" if other is Sharper else "experts"
    for layer in layers(model):
        module = {Sharper: layer, Doubled: layer.experts, Shifted: layer.experts.mlp}[other]
        module.__class__ = other
    ids = torch.tensor(sequences(9))
    with torch.no_grad():
        expected = model(ids).logits
        report = toolkit.patch(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert role not in report.roles()
    assert any(one.role == role and "probe error" in one.reason for one in report.skipped)


def test_a_forward_on_an_instance_keeps_its_layer():
    model = model_of()
    holder = layers(model)[0].experts.mlp
    holder.forward = lambda *args: DbrxExpertGLU.forward(holder, *args)
    report = toolkit.patch(model)
    for role in ("router", "experts"):
        assert report.roles()[role] == len(layers(model)) - 1
        assert any(one.role == role and "another forward" in one.reason for one in report.skipped)
