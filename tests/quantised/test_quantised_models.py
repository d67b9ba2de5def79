"""``toolkit.quantise``: which weights, in place and back, and models that compute what the dequantised ones compute."""

import copy

import pytest
import torch
from torch import nn

import toolkit
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.ops.quantised_linear import makers
from toolkit.patching import report_of, weight_version
from toolkit.quantised import QuantisedWeight, dequantise, quantise, quantised_weights
from toolkit.testing.models import random_model

SEQUENCES = [list(range(3, 40)), [*list(range(3, 20)), 5, 9, 200]]


def pair(family, format, **settings):
    """A quantised model, and one with the dense weights that its own stand for."""
    model = random_model(family, **settings)
    quantise(model, format)
    dense = copy.deepcopy(model)
    assert dequantise(dense) == len(dict(quantised_weights(model))) > 0
    assert not any(quantised_weights(dense))
    return model, dense


def logprobs_and_gradients(model):
    """Log-probabilities, and the gradients of what is trained."""
    found = torch.cat(toolkit.token_logprobs(model, SEQUENCES))
    trained = [p for p in model.parameters() if p.requires_grad]
    return found, torch.autograd.grad(found.sum(), trained)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next_moe"])
@pytest.mark.parametrize("format", makers())
def test_a_model_computes_what_its_dense_weights_compute(family, format):
    model, dense = pair(family, format)
    for one in (model, dense):
        toolkit.patch(one)
    assert report_of(model).roles() == report_of(dense).roles()
    (found, gradients), (wanted, expected) = map(logprobs_and_gradients, (model, dense))
    assert torch.equal(found, wanted)
    assert len(gradients) == len(expected) > 0
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
def test_ordinary_forwards_too(numerics):
    model, dense = pair("llama", "nf4")
    ids = torch.tensor([SEQUENCES[0]])
    for one in (model, dense):
        toolkit.patch(one, numerics=numerics)
    with torch.no_grad():
        found, wanted = (one(ids).logits for one in (model, dense))
    if numerics == "bitwise":
        assert torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_without_a_patch_a_model_runs(family):
    model, dense = pair(family, "int8")
    ids = torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits)


def test_the_weights_of_linear_layers_and_experts_are_quantised_and_the_head_and_routers_are_not():
    model = random_model("qwen3_moe")
    report = quantise(model, "int4")
    found = dict(quantised_weights(model))
    assert set(found) == set(report.formats)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "experts",
    }  # fmt: skip
    assert report.kept == ["lm_head.weight"]
    assert not any(isinstance(one, QuantisedWeight) for one in (model.lm_head.weight, model.model.embed_tokens.weight))
    assert report.quantised_bytes == sum(one.quantised_bytes for one in found.values()) < report.dense_bytes / 5
    assert all(type(module) is nn.Linear for name, module in model.named_modules() if name.endswith("q_proj"))
    assert not any(one.requires_grad for one in found.values())


def test_patterns_choose_and_several_formats_live_in_one_model():
    model = random_model("llama")
    quantise(model, "nf4", include=["*.mlp"])
    quantise(model, "int8", include=["*.self_attn.*"], exclude=["*.layers.0.*"])
    formats = {name: one.format for name, one in quantised_weights(model)}
    assert formats == {
        **{f"model.layers.{n}.mlp.{part}_proj.weight": "nf4" for n in (0, 1) for part in ("gate", "up", "down")},
        **{f"model.layers.1.self_attn.{part}_proj.weight": "int8" for part in "qkvo"},
    }


def test_a_tied_head_stays_dense_by_default_and_stays_tied_otherwise():
    model = random_model("llama", tie_word_embeddings=True)
    quantise(model, "int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head.weight) is nn.Parameter
    quantise(model, "int8", include=["lm_head"], exclude=[])
    assert isinstance(model.lm_head.weight, QuantisedWeight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dense = copy.deepcopy(model)
    dequantise(dense)
    for one in (model, dense):
        toolkit.patch(one)
    found, wanted = (torch.cat(toolkit.token_logprobs(one, SEQUENCES)) for one in (model, dense))
    assert torch.equal(found, wanted)


def test_adapters_stay_dense():
    import peft

    model = peft.get_peft_model(random_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    quantise(model, "nf4")
    names = [name for name, _ in quantised_weights(model)]
    assert names
    assert not any("lora" in name for name in names)
    assert any(name.endswith("q_proj.base_layer.weight") for name in names)


def test_options_of_the_format():
    model = random_model("llama")
    quantise(model, "int4", group=32, symmetric=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.scales[0].shape[1] == weight.shape[1] // 32
    quantise(model, "int4", group=64)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.scales[0].shape[1] == weight.shape[1] // 64


def test_bad_requests():
    model = random_model("llama")
    with pytest.raises(
        ToolkitError, match="format must be one of fp8, int4, int8, nf4, q8_0, got 'int3'; did you mean"
    ):
        quantise(model, "int3")
    with pytest.raises(ToolkitError, match=r"include must match a weight .* got \['no_such'\]"):
        quantise(model, "int8", include=["no_such"])
    with pytest.raises(
        ToolkitError, match="an option of int4 must be one of group, symmetric, scale_dtype, got 'groups'"
    ):
        quantise(model, "int4", groups=32)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(
        ToolkitError, match=r"parameter model.layers.1.mlp.up_proj.weight cannot be quantised: .*finite"
    ):
        quantise(model, "int8")
    assert not any(quantised_weights(model))


def test_state_dicts_round_trip():
    model, other = random_model("qwen3_moe"), random_model("qwen3_moe", seed=1)
    for one in (model, other):
        quantise(one, "int8")
        toolkit.patch(one)
    wanted = torch.cat(toolkit.token_logprobs(model, SEQUENCES))
    assert not torch.equal(torch.cat(toolkit.token_logprobs(other, SEQUENCES)), wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(torch.cat(toolkit.token_logprobs(other, SEQUENCES)), wanted)


def test_the_weight_version_sees_that_weights_are_quantised_and_written():
    model = random_model("llama")
    toolkit.patch(model)
    params = toolkit.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    other = random_model("llama", seed=1)
    quantise(other, "int8")
    with toolkit.Engine(model) as engine:
        seen, texts = [], []
        for write in (
            lambda: None,
            lambda: quantise(model, "int8"),
            lambda: quantise(model, "nf4"),
            lambda: quantise(model, "int8"),
            lambda: model.load_state_dict(other.state_dict()),
            lambda: model.to(torch.bfloat16).to(torch.float32),
        ):
            write()
            (completion,) = engine.generate([list(range(3, 40))], params)
            texts.append(completion)
            seen.append(weight_version(model))
            with torch.no_grad():
                (trained,) = toolkit.token_logprobs(model, [completion.prompt_token_ids + completion.token_ids])
            assert torch.equal(torch.tensor(completion.logprobs), trained[-4:])
        assert len(set(seen)) == len(seen)
        assert [one.weight_versions[0] for one in texts] == seen


def test_a_plain_checkpoint_has_the_values_of_the_codes(tmp_path):
    model, dense = pair("qwen3_moe", "nf4")
    loaded, _ = load_model(str(toolkit.export(model, tmp_path / "out")))
    assert any(quantised_weights(model))
    assert not any(quantised_weights(loaded))
    assert all(map(torch.equal, loaded.state_dict().values(), dense.state_dict().values()))


def test_a_model_is_dequantised_before_it_is_exported_to_another_target(tmp_path):
    model, _ = pair("llama", "nf4")
    with pytest.raises(
        ToolkitError, match=r"model must be dense to be exported to 'gguf', got model\.layers\.0.* in nf4"
    ):
        toolkit.export(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
