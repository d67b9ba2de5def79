"""Patching and taking back in odd situations: copies, hooks, meta devices, ties, quantised and frozen weights."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from transformers import AutoModelForCausalLM

import toolkit
from toolkit.errors import ToolkitError
from toolkit.patching import report_of
from toolkit.testing.models import random_model

IDS = torch.arange(3, 16)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def fingerprint(model):
    """All that a module is made of, beside its tensors' values."""
    modules = [(name, type(one), sorted(one.__dict__)) for name, one in model.named_modules()]
    settings = model.config._attn_implementation, model.config._experts_implementation, model.loss_function
    return modules, settings, list(model.state_dict()), repr(model)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe", "bamba"])
def test_copies_of_a_patched_model_are_patched_and_can_be_taken_back(family):
    model = random_model(family)
    before, was = logits(model), fingerprint(model)
    report = toolkit.patch(model)
    patched, text = logits(model), repr(model)
    assert text == was[3]
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), patched)
    assert toolkit.patch(copied) is report_of(copied) is not report
    assert str(report_of(copied)) == str(report)
    inside = set(copied.modules())
    assert all(claim.module in inside for claim in report_of(copied).claims)
    toolkit.unpatch(copied)
    assert torch.equal(logits(copied), before)
    assert fingerprint(copied) == was
    assert torch.equal(logits(model), patched)
    toolkit.unpatch(model)
    toolkit.unpatch(model)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == was


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "lfm2"])
def test_a_pickled_patched_model_is_the_model(family):
    model = random_model(family)
    before, was = logits(model), fingerprint(model)
    report = toolkit.patch(model)
    patched = logits(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert report_of(loaded) is None
    torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-5)
    again = pickle.loads(pickle.dumps(loaded))
    assert str(toolkit.patch(loaded)) == str(report)
    assert torch.equal(logits(loaded), patched)
    for one in (loaded, again):
        toolkit.unpatch(one)
        assert torch.equal(logits(one), before)
        assert fingerprint(one) == was


def test_a_patched_model_is_freed_with_its_last_reference():
    model = random_model("llama")
    toolkit.patch(model)
    copied = copy.deepcopy(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert report_of(copied) is not None


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_from_pretrained_with_a_device_map(device_map, tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    before, was = logits(model), fingerprint(model)
    assert {"norm", "linear", "attention", "mlp", "head"} <= set(toolkit.patch(model).roles())
    patched = logits(model)
    assert not torch.equal(patched, before)
    toolkit.unpatch(model)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == was


class Noting(AlignDevicesHook):
    seen: list[nn.Module]

    def pre_forward(self, module, *args, **kwargs):
        Noting.seen.append(module)
        return super().pre_forward(module, *args, **kwargs)


def hooked(model):
    for module in model.modules():
        add_hook_to_module(module, Noting(execution_device="cpu", io_same_device=True))
    return model


def test_hooks_of_accelerate_stay_around_a_patched_forward():
    """As they lie on a model that is spread over devices: they move what goes in and comes out."""
    plain = random_model("llama")
    before = logits(plain)
    toolkit.patch(plain)
    patched = logits(plain)
    Noting.seen = []
    model = hooked(random_model("llama"))
    was = fingerprint(model)
    roles = toolkit.patch(model).roles()
    assert roles == report_of(plain).roles()
    Noting.seen = []
    assert torch.equal(logits(model), patched)
    holders = [module for module in model.modules() if module._parameters]
    assert all(Noting.seen.count(module) == 1 for module in holders)
    toolkit.unpatch(model)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == was


def test_hooks_that_come_and_go_around_a_patch():
    model = random_model("llama")
    before = logits(model)
    toolkit.patch(model)
    patched = logits(model)
    Noting.seen = []
    hooked(model)
    assert torch.equal(logits(model), patched)
    toolkit.unpatch(model)
    assert torch.equal(logits(model), before)
    toolkit.patch(model)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), patched)
    toolkit.unpatch(model)
    assert torch.equal(logits(model), before)
    assert not any("_old_forward" in module.__dict__ for module in model.modules())


def test_dispatch_of_accelerate_and_the_engine():
    model, greedy = random_model("llama"), toolkit.SamplingParams(temperature=0)
    with toolkit.Engine(random_model("llama"), num_blocks=16) as engine:
        expected = engine.generate([IDS[0].tolist()], greedy)[0].token_ids
    dispatch_model(model, {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    with toolkit.Engine(model, num_blocks=16) as engine:
        assert engine.generate([IDS[0].tolist()], greedy)[0].token_ids == expected


def test_a_model_without_weights_is_refused_until_they_are_there():
    source = random_model("llama")
    with torch.device("meta"):
        model = type(source)(source.config).eval()
    was = fingerprint(model)
    with pytest.raises(
        ToolkitError,
        match=r"parameter model\.embed_tokens\.weight must be loaded",
    ):
        toolkit.patch(model)
    assert fingerprint(model) == was
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)  # its tables are no state
    toolkit.patch(model)
    toolkit.patch(source)
    assert torch.equal(logits(model), logits(source))
    offloaded = cpu_offload(random_model("llama"), execution_device="cpu")
    expected = logits(offloaded)
    with pytest.raises(ToolkitError, match="or offloaded"):
        toolkit.patch(offloaded)
    assert torch.equal(logits(offloaded), expected)


def test_tied_weights_stay_tied(tmp_path):
    model = random_model("gemma", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    oracle = copy.deepcopy(model)
    toolkit.patch(model)
    for one in (model, oracle):
        one(IDS, labels=IDS).loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight, oracle.lm_head.weight, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of_own(model))


def logits_of_own(model):
    toolkit.unpatch(model)
    return logits(model)


class RoundedLinear(nn.Linear):
    """A quantised layer as libraries make them: a subclass whose weight is something else than it multiplies by."""

    def forward(self, x):
        scale = self.weight.abs().amax(1, keepdim=True) / 7
        return nn.functional.linear(x, (self.weight / scale).round() * scale, self.bias)


def test_quantised_layers_are_skipped():
    model = random_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = RoundedLinear
        layer.self_attn.q_proj.__class__ = RoundedLinear
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    for one, kept in ((model, RoundedLinear), (dynamic, torch.ao.nn.quantized.dynamic.Linear)):
        before, was = logits(one), fingerprint(one)
        roles = toolkit.patch(one).roles()
        assert roles["norm"] == 5
        assert not any("forward" in module.__dict__ for module in one.modules() if isinstance(module, kept))
        torch.testing.assert_close(logits(one), before, rtol=1e-3, atol=1e-3)
        if one is model:  # the other has no gradients, by which attention is proven
            assert roles["attention"] == 2
            with toolkit.Engine(one, num_blocks=16) as engine:
                params = toolkit.SamplingParams(temperature=0, max_tokens=1)
                assert engine.generate([IDS[0].tolist()], params)[0].token_ids == [int(before[0, -1].argmax())]
        toolkit.unpatch(one)
        assert torch.equal(logits(one), before)
        assert fingerprint(one) == was


def test_frozen_parameters_stay_frozen():
    model = random_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    toolkit.patch(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    model(IDS, labels=IDS).loss.backward()
    assert {name: parameter.grad is not None for name, parameter in model.named_parameters()} == wanted
    oracle = random_model("llama")
    oracle(IDS, labels=IDS).loss.backward()
    for name, parameter in oracle.named_parameters():
        if wanted[name]:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
