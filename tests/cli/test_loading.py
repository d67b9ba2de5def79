"""Models from folders: what loads, and the one sentence of each folder that does not."""

import json
import shutil

import pytest
import torch

from toolkit.cli import main
from toolkit.cli.loading import load_model
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refusal(path, **options):
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
    assert f"has no {shard.name}." in refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "outside of its folder" in refusal(tmp_path)
    index.write_text("{}")
    assert "has no weight_map" in refusal(tmp_path)


def test_a_run_loads_its_latest_checkpoint(saved, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2):
        shutil.copytree(saved, checkpoints / f"step-00000{step}")
    (checkpoints / "step-000002" / "config.json").unlink()
    (checkpoints / "latest").write_text("step-000001\n")
    load_model(tmp_path)
    (checkpoints / "latest").write_text("step-000002\n")
    assert "has no config.json" in refusal(tmp_path)
    (checkpoints / "latest").write_text("step-000003\n")
    assert "names 'step-000003'" in refusal(tmp_path)


def test_what_is_not_there_is_named(tmp_path, copy):
    assert "meta/llama' does not exist; models are read from local" in refusal(tmp_path / "meta/llama")
    assert "is a file" in refusal(copy / "config.json")
    assert "neither a config.json nor checkpoints/latest" in refusal(tmp_path)
    assert "dtype is 'int8'; allowed are 'float32'" in refusal(copy, dtype="int8")
    assert "device is 'gpu', which cannot be used" in refusal(copy, device="gpu")
    (copy / "model.safetensors").unlink()
    assert "has no model.safetensors." in refusal(copy)


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
    assert words in refusal(copy)


def test_pickled_weights_are_refused_unread(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "only 'pytorch_model.bin'; pickled weights are refused" in refusal(copy)


@pytest.mark.parametrize("keep", [0, 4, 200, 5000])
def test_cut_weights_are_refused(copy, keep):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "is not a whole safetensors file" in refusal(copy)


def test_weights_that_are_not_this_models_are_refused_and_never_made_up(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    missing = {name: value for name, value in weights.items() if "o_proj" not in name}
    save_file(missing, copy / "model.safetensors", {"format": "pt"})
    assert "lack 'model.layers.0.self_attn.o_proj.weight' and 1 more." in refusal(copy)
    wrong = {**weights, "model.norm.weight": torch.ones(3)}
    save_file(wrong, copy / "model.safetensors", {"format": "pt"})
    assert "cannot be loaded as a causal language model" in refusal(copy)


def test_a_broken_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").write_text("{")
    assert "The tokenizer in" in refusal(copy)


def test_the_command_line_answers_bad_input_with_one_line_and_status_2(saved, tmp_path, capsys):
    for words, message in (
        (["generate", str(tmp_path / "none"), "a"], "does not exist"),
        (["generate", str(saved), "a"], "has no tokenizer"),
        (["generate", str(saved), "a", "--temperature", "-1"], "temperature is -1"),
        (["generate", str(saved), ""], "nothing to continue"),
        (["serve", str(saved), "--port", "70000"], "--port is 70000"),
        (["serve", str(tmp_path / "none"), "--port", "0"], "does not exist"),
        (["serve", str(saved), "--port", "0", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["serve", str(saved), "--host", "no.such.host.invalid"], "Cannot listen on host"),
    ):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        line, *others = [line for line in captured.err.splitlines() if line.startswith("toolkit:")]
        assert others == []
        assert message in line
