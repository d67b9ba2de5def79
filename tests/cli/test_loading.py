"""Models from folders, the Hub's cache and GGUF files: what loads, and the one sentence for what does not."""

import base64
import json
import shutil

import pytest
import torch

from toolkit.cli import main
from toolkit.errors import ToolkitError
from toolkit.loading import find_source, find_tokenizer, load_model, load_tokenizer, load_weights
from toolkit.testing.models import random_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def error_of(path, **options):
    with pytest.raises(ToolkitError) as raised:
        load_model(path, **options)
    message = str(raised.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_a_folder_loads_as_it_was_saved_in_the_dtype_asked_for(saved):
    model, tokenizer = load_model(saved)
    expected = random_model("llama").state_dict()
    assert tokenizer is None
    assert not model.training
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert load_model(saved, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_shards_load_as_one(saved, tmp_path):
    random_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = load_model(tmp_path)[0].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in load_model(saved)[0].state_dict().items())
    shard = min(tmp_path.glob("*.safetensors"))
    shard.unlink()
    assert f"has no {shard.name}." in error_of(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "outside of its folder" in error_of(tmp_path)
    index.write_text("{}")
    assert "has no weight_map" in error_of(tmp_path)


def test_a_run_loads_its_latest_checkpoint(saved, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2):
        shutil.copytree(saved, checkpoints / f"step-00000{step}")
    (checkpoints / "step-000002" / "config.json").unlink()
    (checkpoints / "latest").write_text("step-000001\n")
    load_model(tmp_path)
    (checkpoints / "latest").write_text("step-000002\n")
    assert "has no config.json" in error_of(tmp_path)
    (checkpoints / "latest").write_text("step-000003\n")
    assert "names 'step-000003'" in error_of(tmp_path)


def test_what_is_not_there_is_named(tmp_path, copy):
    assert "meta/llama', which does not exist" in error_of(tmp_path / "meta/llama")
    assert "must be a folder, a GGUF file or org/name, got the file" in error_of(copy / "config.json")
    assert "neither a config.json nor checkpoints/latest" in error_of(tmp_path)
    assert "dtype must be one of float32, bfloat16, float16, float64, got 'int8'." in error_of(copy, dtype="int8")
    assert "device must be one that torch can use, got 'gpu'" in error_of(copy, device="gpu")
    (copy / "model.safetensors").unlink()
    assert "has no model.safetensors." in error_of(copy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "has no model_type"),
        ('{"model_type": "lama"}', "'lama'"),
        ('{"model_type": "t5"}', "cannot be loaded as a causal language model"),
    ],
)
def test_a_wrong_config_is_refused(copy, text, words):
    (copy / "config.json").write_text(text)
    assert words in error_of(copy)


@pytest.mark.parametrize("raw", [b'{"eos_token_id": [2, 0],', b"\xef\xbb\xbf{}", b"\xff\xfe", b"[]"])
def test_a_broken_generation_config_is_refused_and_not_passed_over(copy, raw):
    (copy / "generation_config.json").write_bytes(raw)
    with pytest.raises(ToolkitError, match=r"generation_config\.json"):
        load_model(str(copy))


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A Hub that cannot be reached, with one repository in the cache."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(saved, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.usefixtures("hub")
def test_a_repository_comes_from_the_cache_when_offline(saved):
    expected = load_model(saved)[0].state_dict()
    for options in ({}, {"revision": "main"}):
        weights = load_model("org/name", **options)[0].state_dict()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert load_model("org/name")[0].name_or_path == "org/name"  # what adapters name as their base model
    assert "a repository in the local cache while HF_HUB_OFFLINE is set, got 'org/other'" in error_of("org/other")
    assert "got 'org/name' at revision 'v2'" in error_of("org/name", revision="v2")


def test_adapters_find_their_base_model_on_the_hub(hub, tmp_path):
    import peft

    base = load_model("org/name")[0]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = "org/name"
    model.save_pretrained(tmp_path / "adapters")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "adapters")[0](ids).logits, model.eval()(ids).logits)
    shutil.rmtree(hub)
    assert "names the base model 'org/name': base_model_name_or_path must be a folder or" in error_of(
        tmp_path / "adapters"
    )


def test_code_of_a_checkpoint_runs_only_when_trusted(copy, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copy / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "own_llama"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (copy / "config.json").write_text(json.dumps(config))
    assert "own_llama" in error_of(copy)
    assert type(load_model(copy, trust_remote_code=True)[0]).__name__ == "OwnModel"


def test_gguf_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    from toolkit.loading import model

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    assert "m.gguf' needs the package 'gguf': pip install gguf." in error_of(tmp_path / "m.gguf")


def test_pickled_weights_are_refused_unread(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "only 'pytorch_model.bin'; pickled weights are not loaded" in error_of(copy)


@pytest.mark.parametrize("keep", [0, 4, 200, 5000])
def test_cut_weights_are_refused(copy, keep):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "is not a whole safetensors file" in error_of(copy)


def test_weights_that_are_not_this_models_are_refused_and_never_random(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    missing = {name: value for name, value in weights.items() if "o_proj" not in name}
    save_file(missing, copy / "model.safetensors", {"format": "pt"})
    assert "lack 'model.layers.0.self_attn.o_proj.weight' and 1 more." in error_of(copy)
    wrong = {**weights, "model.norm.weight": torch.ones(3)}
    save_file(wrong, copy / "model.safetensors", {"format": "pt"})
    assert "cannot be loaded as a causal language model" in error_of(copy)


def test_the_byte_order_mark_of_a_template_is_no_text(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    loaded = load_tokenizer(find_tokenizer(str(tmp_path)))
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_broken_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").write_text("{")
    assert "The tokenizer in" in error_of(copy)


def test_bad_input_on_the_command_line_is_one_line_and_status_2(saved, tmp_path, capsys):
    for words, message in (
        (["generate", str(tmp_path / "none"), "a"], "does not exist"),
        (["generate", str(saved), "a"], "has no tokenizer"),
        (["generate", str(saved), "a", "--temperature", "-1"], "temperature must be a finite number >= 0, got -1"),
        (["generate", str(saved), ""], "nothing to continue"),
        (["serve", str(saved), "--port", "70000"], "--port must be >= 0 and <= 65535, got 70000"),
        (["serve", str(tmp_path / "none"), "--port", "0"], "does not exist"),
        (["serve", str(saved), "--port", "0", "--max-num-seqs", "0"], "max_num_seqs must be an integer >= 1, got 0"),
        (["serve", str(saved), "--host", "no.such.host.invalid"], "Cannot listen on host"),
    ):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        line, *others = [line for line in captured.err.splitlines() if line.startswith("toolkit:")]
        assert others == []
        assert message in line


def write_gguf(path, without=()):
    """A llama of one layer with random float32 weights, without the tensors that are named."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    shapes = {"token_embd": (32, 16), "output_norm": (16,), "output": (32, 16)}
    for name, shape in (
        *((f"attn_{one}", (16, 16)) for one in ("q", "k", "v", "output")),
        *((f"ffn_{one}", (24, 16)) for one in ("gate", "up")),
        ("ffn_down", (16, 24)),
        ("attn_norm", (16,)),
        ("ffn_norm", (16,)),
    ):
        shapes[f"blk.0.{name}"] = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if name not in without}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_loads_and_can_be_saved(tmp_path):
    tensors = write_gguf(tmp_path / "m.gguf")
    model = load_weights(find_source(tmp_path / "m.gguf"), "float32")
    assert torch.equal(model.get_input_embeddings().weight, tensors["token_embd"])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, tensors["blk.0.ffn_down"])
    model.save_pretrained(tmp_path / "saved")
    again = load_weights(find_source(tmp_path / "saved")).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert load_weights(find_source(tmp_path / "m.gguf"), "bfloat16").dtype == torch.bfloat16
    write_gguf(tmp_path / "part.gguf", without=["blk.0.attn_v"])
    with pytest.raises(
        ToolkitError, match=r"The weights in '.*part.gguf' lack 'model.layers.0.self_attn.v_proj.weight'\."
    ):
        load_weights(find_source(tmp_path / "part.gguf"))


def save_tekken(folder, **more):
    """A folder's ``tekken.json`` with every byte and "ab" behind four special tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab"]
    special = ("<unk>", "<s>", "</s>", "[INST]")
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(one).decode(), "token_str": None}
        for rank, one in enumerate(tokens)
    ]
    content = {
        "config": {"pattern": "[a-z]+|[^a-z]", "default_vocab_size": 261, "default_num_special_tokens": 4},
        "vocab": vocabulary,
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(content | more))


def test_a_tokenizer_of_mistral_s_alone_is_read_with_its_first_token(copy):
    save_tekken(copy)
    (copy / "chat_template.jinja").write_text("[INST]{{ messages[0].content }}")
    tokenizer = load_model(copy)[1]
    assert tokenizer("abab\u00e9")["input_ids"] == [1, 260, 260, 4 + 0xC3, 4 + 0xA9]
    assert tokenizer("[INST]", add_special_tokens=False)["input_ids"] == [3]
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<s>", 2)
    assert tokenizer.decode([1, 260, 4 + 0xC3, 4 + 0xA9], skip_special_tokens=True) == "ab\u00e9"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[INST]a"


def test_what_a_tokenizer_of_mistral_s_lacks_is_said(copy, monkeypatch):
    (copy / "tokenizer.model.v3").write_bytes(b"")
    assert "has tokenizer.model.v3 alone; put the model's tokenizer.json beside it." in error_of(copy)
    save_tekken(copy, special_tokens=None)  # as of 2024: their names are in the package
    monkeypatch.setattr("transformers.integrations.mistral.tokenizer.is_mistral_common_available", lambda: False)
    monkeypatch.setattr("transformers.utils.import_utils.is_mistral_common_available", lambda: False)
    assert error_of(copy).endswith("needs the package mistral-common: pip install mistral-common.")
