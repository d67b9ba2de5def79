"""Experts that take all tokens, scaled by scores (Llama 4): router and experts of such layers, against stock."""

import copy
import statistics

import pytest
import torch
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextMoe

import toolkit
from tests.helpers.routed_completions import greedy_with_experts
from toolkit.testing.architectures import small_model
from toolkit.testing.oracle import eager
from toolkit.testing.parity import check_parity

TOP_K = [1, 2]


def model_of(**settings):
    """A small model whose weights are as large as those of a trained one, so that its tokens are told apart."""
    model = small_model("llama4_text", **settings)
    source = torch.Generator().manual_seed(settings.get("seed", 0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.08, generator=source)
    return model


def sequences(*lengths):
    source = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (length,), generator=source).tolist() for length in lengths]


@pytest.mark.parametrize("top_k", TOP_K)
def test_values_and_gradients_are_those_of_stock(top_k):
    model = model_of(num_experts_per_tok=top_k)
    stock, ids = eager(copy.deepcopy(model)), torch.tensor(sequences(24, 24))
    report = toolkit.patch(model)
    assert report.roles()["router"] == report.roles()["experts"] == model.config.num_hidden_layers
    for one in (stock, model):
        one(ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name].grad).norm()
        assert error <= 1e-4 * expected[name].grad.norm().clamp_min(1e-4), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_differs_between_engine_and_training(dtype):
    assert check_parity(model_of(num_experts_per_tok=2).to(dtype), sequences(5, 30, 17), min_tokens=120).differing == 0


def test_greedy_tokens_are_those_of_generate_and_routing_is_returned_and_replayed():
    model = model_of(num_experts_per_tok=2)
    (prompt,) = sequences(20)
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    toolkit.patch(model)
    found = greedy_with_experts(model, prompt, 10)
    whole = prompt + found.token_ids
    assert whole == expected[0].tolist()
    routed = found.routed_experts
    assert routed.shape == (len(whole) - 1, model.config.num_hidden_layers, 2)
    with torch.no_grad():
        (got,) = toolkit.token_logprobs(model, [whole[:-1]], routing=[routed])
    assert got[-len(found.logprobs) + 1 :].tolist() == found.logprobs[:-1]


def test_a_hook_on_a_router_sees_scores_and_logits_of_all_experts():
    model, ids, seen = model_of(), torch.tensor(sequences(9)), []
    router = model.model.layers[0].feed_forward.router
    router.register_forward_hook(lambda _, args, outputs: seen.append(outputs[:2]))
    with torch.no_grad():
        model(ids)
        toolkit.patch(model)
        model(ids)
    for expected, got in zip(seen[0], seen[-1], strict=True):  # probes call copies of it between
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class Doubled(Llama4Router):
    def forward(self, hidden_states):
        scores, logits = super().forward(hidden_states)
        return scores * 2, logits


class Added(Llama4TextMoe):
    def forward(self, hidden_states):
        out, logits = super().forward(hidden_states)
        return out + hidden_states.reshape(out.shape), logits


@pytest.mark.parametrize("other", [Doubled, Added])
def test_another_layer_keeps_its_forward(other):
    model = model_of()
    for layer in model.model.layers:
        module = layer.feed_forward.router if other is Doubled else layer.feed_forward
        module.__class__ = other
    ids = torch.tensor(sequences(9))
    with torch.no_grad():
        expected = model(ids).logits
        report = toolkit.patch(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert {"experts", "router"}.isdisjoint(claim.role for claim in report.claims if claim.path)
    assert any(one.role == "experts" and "probe error" in one.reason for one in report.skipped)


def in_autocast(model, ids, enabled=True):
    """Gradients as one vector, and the experts of each token and layer."""
    chosen = []

    def note(_, args, outputs):
        chosen.append(outputs[1].float().argmax(-1))

    hooks = [layer.feed_forward.router.register_forward_hook(note) for layer in model.model.layers]
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = model(ids, labels=ids, use_cache=False).loss
    for hook in hooks:
        hook.remove()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]), torch.cat(chosen)


def compared(seed):
    """Of stock and of a patched model in autocast: the distance of gradients from float64's, tokens sent elsewhere."""
    model, ids = model_of(seed=seed), torch.tensor(sequences(13, 13))
    exact, chosen = in_autocast(eager(copy.deepcopy(model)).double().train(), ids, enabled=False)
    patched = copy.deepcopy(model).train()
    toolkit.patch(patched)
    found = []
    for one in (eager(model).train(), patched):
        gradients, experts = in_autocast(one, ids)
        found.append((float((gradients - exact).norm() / exact.norm()), int((experts != chosen).sum())))
    return found


def test_gradients_in_autocast_are_as_near_to_float64_as_stocks_where_no_token_goes_elsewhere():
    unmoved = [pair for pair in map(compared, range(8)) if not pair[0][1] and not pair[1][1]]
    assert len(unmoved) >= 2
    for (allowed, _), (error, _) in unmoved:
        assert error <= 1.5 * allowed


@pytest.mark.sweep
def test_no_more_tokens_go_elsewhere_in_autocast_than_in_stock():
    """Logits are computed in float32; autocast rounds them to bfloat16, and one token at another expert is percents."""
    stock, patched = zip(*map(compared, range(40)), strict=True)
    assert sum(moved for _, moved in patched) <= sum(moved for _, moved in stock)
    assert statistics.median(error for error, _ in patched) <= statistics.median(error for error, _ in stock)
