"""compressed-tensors' formats: transformers opens them, and the library's own compressors read the same values."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.tokenizers import make_tokenizer
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, export
from toolkit.exporting.compressed_tensors import compressed, packed
from toolkit.loading import load_model
from toolkit.patching import patch
from toolkit.quantised import QuantisedWeight, quantise, quantised_weights
from toolkit.quantised.stored.compressed_tensors import HELD, write
from toolkit.testing.models import random_model

library = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors, with which transformers reads it")
FORMATS = ("w8a16", "w4a16", "fp8")
# Half a step of the largest value of a group: of 255 and 15 steps, and of float8 with 3 bits behind the first.
ROUNDING = {"w8a16": 1 / 255, "w4a16": 1 / 15, "fp8": 2**-4}


def dequantised(parts: dict[str, torch.Tensor], form: str, shape: torch.Size) -> torch.Tensor:
    """By the library's own unpacking."""
    if form == "fp8":
        return parts["weight"].float() * parts["weight_scale"].float()
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    bits = 8 if form == "w8a16" else 4
    whole = unpack_from_int32(parts["weight_packed"], bits, shape).float()
    scale = parts["weight_scale"]
    return (whole.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("group", [None, 32])
def test_the_library_reads_values_within_the_rounding(form, group):
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    read = dequantised(compressed(weight, form, group), form, weight.shape)
    groups = weight.reshape(24, -1, 96 if group is None or form == "fp8" else group)
    largest = groups.abs().amax(-1, keepdim=True)
    error = (read.reshape(groups.shape) - groups).abs()
    # Scales of 8 bits in groups are float16, at most 2^-10 above the least that the group's largest value needs.
    above = 2.0**-10 if form == "w8a16" and group else 0.0
    assert (error <= largest * ROUNDING[form] * (1.0001 + above)).all()
    assert error.max() > 0
    assert (read[3] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 37])
def test_words_are_those_that_the_library_packs(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (bits - 1)
    values = torch.randint(-half, half, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed(values.int() + half, bits), pack_to_int32(values, bits))


@pytest.mark.parametrize("form", FORMATS)
def test_transformers_opens_it_and_it_may_be_patched(form, tmp_path):
    model = random_model("qwen3", hidden=64, vocabulary=340)
    path = export(model, tmp_path / "out", "compressed-tensors", make_tokenizer(), form, [[5, 6, 7]], 4)
    proof = json.loads((path / MANIFEST).read_text())["proof"]
    assert "compressed-tensors" in proof["consumer"]
    assert len(proof["outputs"][0]) == 4
    opened = load_model(str(path))[0]
    group = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    weight = model.model.layers[1].mlp.down_proj.weight
    expected = dequantised(compressed(weight.detach(), form, group["weights"].get("group_size")), form, weight.shape)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        logits = opened(ids).logits
        assert torch.equal(opened.model.layers[1].mlp.down_proj.weight.float(), expected)
        assert torch.equal(opened.lm_head.weight, model.lm_head.weight)
        patch(opened)
        assert (opened(ids).logits - logits).abs().max() < 1e-4


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_opens_here_with_the_values_that_the_library_reads(form, dtype, tmp_path):
    model = random_model("llama", hidden=64, intermediate_size=192).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape[0]).to(dtype).view(-1, *[1] * (parameter.dim() - 1)))
    folder = export(model, tmp_path / "out", "compressed-tensors", quantise=form)
    opened, _ = load_model(str(folder))
    weights = dict(quantised_weights(opened))
    assert weights
    group = {"w8a16": 64, "w4a16": 64}.get(form)
    for name, weight in weights.items():
        dense = model.get_parameter(f"{name}.weight" if not name.endswith("weight") else name).detach()
        read = dequantised(compressed(dense, form, group), form, dense.shape)
        assert torch.equal(weight.dequantise().float(), read.to(weight.dtype).float()), name


def test_shards_and_their_index_name_the_new_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.exporting.hf.SHARD", "60KB")
    path = export(random_model("llama", hidden=64, vocabulary=340), tmp_path / "out", "compressed-tensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert "model.layers.0.mlp.up_proj.weight_packed" in index
    assert "model.layers.0.mlp.up_proj.weight" not in index


def test_experts_are_refused_by_name(tmp_path):
    with pytest.raises(ToolkitError, match="'compressed-tensors' cannot hold experts, got a Qwen3MoeForCausalLM"):
        export(random_model("qwen3_moe"), tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


# format, options of its quantiser, and whether transformers opens the file (not with zeros: on the meta device the
# library does not pack them, and finds another shape).
CODED = [
    ("int4", {"group": 32, "symmetric": True}, True),
    ("int4", {"group": 64}, False),
    ("int8", {}, True),
    ("q8_0", {}, True),
    ("fp8", {}, True),
]


@pytest.mark.parametrize(("format", "options", "opens"), CODED)
def test_codes_are_exported_as_they_are(format, options, opens, tmp_path):
    model = random_model("llama", hidden=128, vocabulary=340, intermediate_size=192)
    quantise(model, format, exclude=["lm_head", "*.o_proj"], **options)
    path = export(model, tmp_path / "out", "compressed-tensors", make_tokenizer())
    assert json.loads((path / MANIFEST).read_text())["quantise"] == HELD[format]
    opened = load_model(str(path))[0]
    weights, again = (dict(quantised_weights(one)) for one in (model, opened))
    assert weights.keys() == again.keys()
    assert len(weights) == 12
    for name, weight in weights.items():
        assert again[name].format == format
        assert torch.equal(again[name].dequantise(), weight.dequantise())
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, model(ids).logits)
    if opens:
        stock = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            stock(ids)
        for name, weight in weights.items():
            assert torch.equal(stock.get_parameter(name), weight.dequantise())


def test_the_library_reads_zeros(tmp_path):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = QuantisedWeight.of(torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) + 0.5, "int4", group=32)
    parts, kind = write(weight)
    assert not kind["symmetric"]
    codes = unpack_from_int32(parts["weight_packed"], 4, weight.shape).float()
    zeros = unpack_from_int32(parts["weight_zero_point"], 4, torch.Size((40, 3)), packed_dim=0).float()
    found = (codes.unflatten(1, (3, 32)) - zeros.unsqueeze(2)) * parts["weight_scale"].float().unsqueeze(2)
    assert torch.equal(found.flatten(1), weight.dequantise())


@pytest.mark.parametrize(
    ("format", "options", "sentence"),
    [
        ("nf4", {}, r"must be dense, or quantised to one format that w8a16 holds, got model\.layers.* in nf4"),
        ("int4", {"group": 128}, "groups of compressed-tensors must divide the inputs, got 192 in groups of 128"),
    ],
)
def test_codes_that_it_does_not_hold_are_refused(format, options, sentence, tmp_path):
    model = random_model("llama", hidden=128, vocabulary=340, intermediate_size=192)
    quantise(model, format, **options)
    with pytest.raises(ToolkitError, match=sentence):
        export(model, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())
