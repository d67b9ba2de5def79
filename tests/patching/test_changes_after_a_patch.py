"""What others do to a model before and after a patch is noticed: forwards of instances, settings, implementations."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.errors import ToolkitError
from toolkit.patching import report_of
from toolkit.testing.models import random_model

IDS = torch.arange(3, 16)[None]
GREEDY = toolkit.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def rounding(module):
    """As a quantiser does it: the module's forward behind another one, on the instance."""
    own = module.forward
    module.forward = types.MethodType(lambda self, x, own=own: own((x * 4).round() / 4), module)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.0.self_attn.q_proj", "linear"),
        ("model.layers.0.input_layernorm", "norm"),
        ("model.layers.1.mlp", "mlp"),
        ("lm_head", "head"),
    ],
)
def test_a_module_with_a_forward_on_its_instance_keeps_it(path, role):
    model = random_model("llama")
    plain = logits(model)
    rounding(model.get_submodule(path))
    forward = model.get_submodule(path).forward
    expected = logits(model)
    assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3)
    whole = toolkit.patch(random_model("llama")).roles()
    report = toolkit.patch(model)
    assert report.roles()[role] == whole[role] - 1
    (skipped,) = [one for one in report.skipped if one.path == path]
    assert "another forward than its class" in skipped.reason
    assert "rounding" in skipped.reason
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    toolkit.unpatch(model)
    assert model.get_submodule(path).forward is forward
    assert torch.equal(logits(model), expected)


def test_an_attention_layer_with_a_forward_on_its_instance_leaves_attention_alone():
    model = random_model("llama")
    layer = model.model.layers[0].self_attn
    own = layer.forward
    layer.forward = types.MethodType(lambda self, hidden_states, **more: own(1.5 * hidden_states, **more), layer)
    expected = logits(model)
    report = toolkit.patch(model)
    assert "attention" not in report.roles()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ToolkitError, match="another forward than its class"):
        toolkit.token_logprobs(model, [[3, 4, 5]])


def test_an_activation_with_a_forward_on_its_instance_is_part_of_no_fused_mlp():
    model = random_model("llama")
    rounding(model.model.layers[0].mlp.act_fn)
    expected = logits(model)
    report = toolkit.patch(model)
    assert [claim.path for claim in report.claims if claim.role == "mlp"] == ["model.layers.1.mlp"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_an_activation_is_called(when):
    model = random_model("llama")
    seen = []

    def hook(module, inputs, output):
        seen.append(module)
        return output * 1.5

    def add():
        return [layer.mlp.act_fn.register_forward_hook(hook) for layer in model.model.layers]

    handles = add()
    expected = logits(model)
    if when == "after":
        for handle in handles:
            handle.remove()
    toolkit.patch(model)
    if when == "after":
        add()
    seen.clear()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2


def test_parametrised_and_weight_normalised_layers_are_right():
    model = random_model("llama")
    nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", nn.Tanh(), unsafe=True)
    with torch.no_grad():
        nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.q_proj)
    expected = logits(model)
    toolkit.patch(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    nn.utils.parametrize.register_parametrization(model.model.layers[1].mlp.up_proj, "weight", nn.Tanh(), unsafe=True)
    got = logits(model)
    assert not torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
    toolkit.unpatch(model)
    torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-5)


def test_a_forward_that_is_put_over_the_patch_is_noticed():
    model = random_model("llama")
    toolkit.patch(model)
    toolkit.token_logprobs(model, [[3, 4, 5]])
    norm, forward = model.model.norm, model.model.norm.forward
    norm.forward = types.MethodType(lambda self, x: 2 * F.rms_norm(x, x.shape[-1:]), norm)
    for use in (
        lambda: toolkit.token_logprobs(model, [[3, 4, 5]]),
        lambda: toolkit.Engine(model, num_blocks=16),
        lambda: toolkit.patch(model),
        lambda: toolkit.unpatch(model),
    ):
        with pytest.raises(ToolkitError, match=r"forward of model\.norm must be the one that the patch put there"):
            use()
    norm.forward = forward
    toolkit.token_logprobs(model, [[3, 4, 5]])
    toolkit.unpatch(model)
    assert "forward" not in norm.__dict__


def test_a_wrapper_around_the_patch_is_allowed():
    model = random_model("llama")
    toolkit.patch(model)
    expected = toolkit.token_logprobs(model, [[3, 4, 5]])[0]
    inner = model.model.norm.forward

    def around(x):
        return inner(x)

    around.__wrapped__ = inner
    model.model.norm.forward = around
    assert torch.equal(toolkit.token_logprobs(model, [[3, 4, 5]])[0], expected)


def test_a_forward_that_is_replaced_on_the_class_after_a_patch_is_noticed(monkeypatch):
    model = random_model("llama")
    report = toolkit.patch(model)
    kind = type(model.model.norm)

    def centred(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.variance_epsilon)

    monkeypatch.setattr(kind, "forward", centred)
    with pytest.raises(ToolkitError, match=f"forward of {kind.__name__} must be the one that was patched"):
        toolkit.token_logprobs(model, [[3, 4, 5]])
    expected = logits(random_model("llama"))
    again = toolkit.patch(model)
    assert again is not report
    assert "layer_norm" in {claim.op for claim in again.claims if claim.role == "norm"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def set_path(model, path, value):
    owner, name = path.rsplit(".", 1)
    holder = model
    for part in owner.split("."):
        holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
    setattr(holder, name, value)


CHANGED = {
    "window": ("mistral", "model.config.sliding_window", 3),
    "layer's window": ("qwen3", "model.layers.1.self_attn.sliding_window", 3),
    "activation": ("llama", "model.layers.1.mlp.act_fn", nn.GELU()),
    "top_k": ("qwen3_moe", "model.layers.1.mlp.gate.top_k", 1),
    "norm_topk_prob": ("qwen3_moe", "model.layers.1.mlp.gate.norm_topk_prob", None),
    "experts' activation": ("qwen3_moe", "model.layers.1.mlp.experts.act_fn", nn.GELU()),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_setting_that_is_changed_after_a_patch_is_noticed_and_proven_again(change):
    family, path, value = CHANGED[change]
    model = random_model(family)
    if value is None:
        value = not model.model.layers[1].mlp.gate.norm_topk_prob
    report = toolkit.patch(model)
    other = copy.deepcopy(model)
    name = path.rsplit(".", 1)[1]
    with toolkit.Engine(model, num_blocks=32, max_num_seqs=2) as engine:
        assert engine.generate([IDS[0].tolist()], GREEDY)[0].error is None
        set_path(model, path, value)
        assert name in str(engine.generate([IDS[0].tolist()], GREEDY)[0].error)
    for use in (logits, lambda model: toolkit.token_logprobs(model, [[3, 4, 5]])):
        with pytest.raises(ToolkitError, match=rf"{name}\S* of \S+ must be .* when the model was patched, got"):
            use(model)
    assert toolkit.patch(model) is not report
    got = logits(model)
    assert not torch.allclose(got, logits(other), rtol=1e-3, atol=1e-3) or "layer's" in change
    toolkit.unpatch(model)
    torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-5)


def test_what_is_read_again_follows_and_captured_graphs_are_dropped():
    model = random_model("llama")
    prompt = IDS[0].tolist()
    toolkit.patch(model)
    with toolkit.Engine(model, num_blocks=32, max_num_seqs=2) as engine:
        before = engine.generate([prompt], GREEDY)[0]
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 3.0
            if hasattr(module, "scaling"):
                module.scaling *= 1.7
        after = engine.generate([prompt], GREEDY)[0]
    assert before.logprobs != after.logprobs
    again = toolkit.token_logprobs(model, [prompt + after.token_ids])[0]
    assert again[len(prompt) - 1 :].tolist() == after.logprobs
    got = logits(model)
    toolkit.unpatch(model)
    torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["method", "inner method", "configuration"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_another_attention_implementation_after_a_patch_is_an_error_until_it_is_patched_again(family, way):
    model = random_model(family)
    expected = logits(model)
    report = toolkit.patch(model)
    if way == "configuration":
        model.config._attn_implementation = "eager"
    else:
        (model if way == "method" else model.base_model).set_attn_implementation("eager")
    for use in (logits, lambda model: toolkit.token_logprobs(model, [[3, 4, 5]])):
        with pytest.raises(
            ToolkitError, match=r"config\._attn_implementation of \w+ must be 'toolkit', as .* got 'eager'"
        ):
            use(model)
    again = toolkit.patch(model)
    assert again is report_of(model) is not report
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "toolkit"
    model.set_attn_implementation("sdpa")
    toolkit.unpatch(model)
    assert model.config._attn_implementation == "sdpa"  # the last word is the user's


def test_another_experts_implementation_after_a_patch_is_an_error():
    model = random_model("qwen3_moe")
    expected = logits(model)
    toolkit.patch(model)
    model.set_experts_implementation("eager")
    with pytest.raises(ToolkitError, match=r"config\._experts_implementation of \w+ must be 'toolkit'"):
        logits(model)
    toolkit.patch(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
