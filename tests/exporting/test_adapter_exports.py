"""Adapters exported alone: PEFT opens the folder, llama.cpp puts the file on the base model's."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.adapter_folders import save_adapter
from tests.helpers.tokenizers import make_tokenizer
from toolkit.cli import main
from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, export
from toolkit.loading import load_model, load_with_adapters
from toolkit.testing.models import random_model

peft = pytest.importorskip("peft")
SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "ranks and alphas by layer": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 5},
    },
}


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    export(random_model("llama", hidden=48, vocabulary=340), tmp_path / "base", tokenizer=make_tokenizer())
    return tmp_path / "base"


def adapted(base, **settings):
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], **settings})
    model = peft.get_peft_model(load_model(str(base))[0], config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_peft_opens_the_folder(base, tmp_path):
    model = adapted(base, r=4)
    path = export(model, tmp_path / "out", "peft", make_tokenizer(), prompts=[[5, 6, 7]], max_tokens=4)
    assert not list(path.glob("model*"))
    proof = json.loads((path / MANIFEST).read_text())["proof"]
    assert proof["consumer"].startswith("peft ")
    ids = torch.tensor([[5, 6, 7, *proof["outputs"][0]]])
    with torch.no_grad():
        assert model(ids).logits[0, 2:-1].argmax(-1).tolist() == proof["outputs"][0]
        assert torch.equal(load_with_adapters(path)(ids).logits, model(ids).logits)


def test_an_adapter_of_another_name_lies_in_the_folder_itself(base, tmp_path):
    model = adapted(base, r=4)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    path = export(model, tmp_path / "out", "peft")
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("settings", SETTINGS)
def test_llama_cpp_computes_the_adapted_model(settings, base, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, which opens GGUF files")
    from tests.helpers.llama_cpp import differences
    from toolkit.exporting.gguf.consumer import LlamaCpp

    model = adapted(base, **SETTINGS[settings])
    file = export(load_model(str(base))[0], tmp_path / "gguf", "gguf", make_tokenizer(), "f32") / "model.gguf"
    adapter = export(model, tmp_path / "lora", "gguf-lora") / "adapter.gguf"
    sequence = torch.randint(5, 340, (24,), generator=torch.Generator().manual_seed(2)).tolist()
    with LlamaCpp(file, 32, adapter) as server:
        seen = differences(server, model, [sequence], 2e-4)
    assert seen.largest < 2e-4, seen
    with LlamaCpp(file, 32) as server:
        assert differences(server, model, [sequence[:6]], 2e-4).largest > 0.01


REFUSED = [
    ({"use_dora": True}, "use_dora must be false"),
    ({"bias": "lora_only"}, "bias must be 'none', got 'lora_only'"),
    ({"modules_to_save": ["lm_head"]}, "cannot hold '.*lm_head.*': llama.cpp has adapters of linear layers alone"),
    ({"target_modules": ["embed_tokens"]}, "cannot hold '.*lora_embedding_A.*'"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED)
def test_adapters_that_llama_cpp_does_not_have_are_refused_by_name(settings, sentence, base, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ToolkitError, match=sentence):
        export(adapted(base, **settings), tmp_path / "out", "gguf-lora")
    assert not (tmp_path / "out").exists()


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ToolkitError, match="'peft' holds PEFT's adapters, got a LlamaForCausalLM without any"):
        export(random_model("llama"), tmp_path / "out", "peft")


def test_the_command_exports_adapters_and_compares(base, tmp_path, capsys):
    adapters = export(adapted(base, r=4), tmp_path / "adapters", "peft", make_tokenizer())
    assert main(["export", str(adapters), str(tmp_path / "again"), "--to", "peft"]) == 0
    assert "8 of 8 prompts give the same 64 greedy tokens" in capsys.readouterr().out


def test_adapters_that_an_engine_holds_stay_out_of_the_base_models_export(tmp_path):
    model = random_model("llama", hidden=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = save_adapter(model, tmp_path / "adapter", 1)
    with Engine(model) as engine:
        engine.load_adapter("one", folder)
        params = SamplingParams(max_tokens=2, temperature=0.0, lora_name="one")
        (one,) = engine.generate([[1, 2, 3]], params)
        first = one.token_ids, one.logprobs, one.weight_versions
        found = load_file(export(model, tmp_path / "base") / "model.safetensors")
        assert found.keys() <= before.keys()
        assert all(torch.equal(found[name], before[name]) for name in found)
        (again,) = engine.generate([[1, 2, 3]], params)
        assert (again.token_ids, again.logprobs, again.weight_versions) == first


def test_an_acting_adapter_that_an_engine_would_not_choose_is_refused(tmp_path):
    model = random_model("llama", hidden=32)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model, "acts")
    model.__dict__.pop("peft_config", None)
    with pytest.raises(ToolkitError, match="model must have no adapter in it to be exported to 'hf', got acts"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
