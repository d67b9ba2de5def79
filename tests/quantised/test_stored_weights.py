"""Folders in other libraries' layouts: their weights have the values of the formats' definitions, and are served."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import toolkit
from tests.helpers.quantised_folders import LAYOUTS, write_folder
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.quantised import QuantisedWeight, quantised_weights
from toolkit.quantised.stored import libraries
from toolkit.testing.models import random_model

FORMATS = {
    "gptq": "int4",
    "awq": "int4",
    "w4a16": "int4",
    "w8a16": "int8",
    "fp8": "fp8",
    "bnb": "nf4",
    "bnb_nested": "nf4",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_loads_with_its_codes(tmp_path: Path, layout: str) -> None:
    source = random_model("llama", hidden=64, intermediate_size=128)
    values = write_folder(source, tmp_path, layout)
    model, _ = load_model(str(tmp_path))
    found = dict(quantised_weights(model))
    assert found.keys() == values.keys()
    for name, weight in found.items():
        assert weight.format == FORMATS[layout]
        assert torch.equal(weight.dequantise(), values[name]), name
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert not hasattr(model.config, "quantization_config")
    toolkit.patch(model)
    params = toolkit.SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
    with toolkit.Engine(model) as engine:
        (one,) = engine.generate([[3, 4, 5]], params)
    with torch.no_grad():
        (trained,) = toolkit.token_logprobs(model, [one.prompt_token_ids + one.token_ids])
    assert torch.equal(torch.tensor(one.logprobs), trained[-4:])


def test_experts_that_are_joined_are_dequantised(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    values = write_folder(model, tmp_path, "w4a16")
    assert any("experts" in name for name in values)
    loaded, _ = load_model(str(tmp_path))
    found = dict(quantised_weights(loaded))
    assert {name for name in values if "experts" not in name} == set(found)
    experts = loaded.model.layers[0].mlp.experts
    gate = values["model.layers.0.mlp.experts.0.gate_proj.weight"]
    assert torch.equal(experts.gate_up_proj[0, : len(gate)], gate)


def test_a_folder_loads_in_16_bits(tmp_path: Path) -> None:
    values = write_folder(random_model("llama"), tmp_path, "awq")
    model, _ = load_model(str(tmp_path), dtype="bfloat16")
    for name, weight in quantised_weights(model):
        assert torch.equal(weight.dequantise(), values[name].bfloat16())
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "settings", "tensors", "expected"),
    [
        ("gptq", {"bits": 3}, {}, "bits of GPTQ must be 4, got 3."),
        ("awq", {"bits": 4, "version": "gemv"}, {}, "AWQ must have 4 bits and version gemm, got 4 and gemv."),
        ("compressed-tensors", {}, {"weight_g_idx": torch.zeros(2)}, "actorder of compressed-tensors must not"),
    ],
)
def test_what_no_format_holds_is_one_sentence(method, settings, tensors, expected) -> None:
    with pytest.raises(ToolkitError) as caught:
        libraries()[method].read(settings, tensors, torch.float32)
    assert str(caught.value).startswith(expected)


def test_reordered_groups_of_gptq_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_folder(random_model("llama"), tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToolkitError, match=r"layer model\.layers\.0\.mlp\.down_proj cannot be read: desc_act of GPTQ"):
        load_model(str(tmp_path))


def test_every_library_has_marks() -> None:
    assert set(libraries()) == {"gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"}
    assert all(library.marks for library in libraries().values())
    assert issubclass(QuantisedWeight, torch.Tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_with_the_tensors_of_a_library_is_adopted(layout: str) -> None:
    make, settings = LAYOUTS[layout]
    tensors, value = make(torch.Generator().manual_seed(0), 200, 256)
    layer = nn.Module()
    for name, one in tensors.items():
        layer.register_buffer(name.replace(".", "_"), one)
    names = {name.replace(".", "_"): name for name in tensors}
    layer.state_dict = lambda **_: {name: getattr(layer, key) for key, name in names.items()}
    layer.bias = nn.Parameter(torch.ones(200))
    model = nn.Sequential(layer)
    model.config = SimpleNamespace(quantization_config=settings)
    report = toolkit.quantise(model)
    assert report.formats == {"0.weight": FORMATS[layout]}
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight.dequantise(torch.float32), value)
    assert model[0].bias.dtype == model[0].weight.dtype


def test_a_model_of_dense_layers_has_nothing_to_adopt() -> None:
    with pytest.raises(ToolkitError, match="format must be given for a model none of whose layers"):
        toolkit.quantise(random_model("llama"))
