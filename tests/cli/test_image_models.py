"""Checkpoints with image towers: opened as the class that wrote them, exported with every tensor under its name."""

import json

import pytest
import torch
from safetensors import safe_open

from toolkit.errors import ToolkitError
from toolkit.exporting import export
from toolkit.loading import auto_class, load_model
from toolkit.testing.architectures import IMAGE_TEXT, small_config, small_model


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of Qwen 3.5: its text is a causal language model's, too."""
    folder = tmp_path_factory.mktemp("models") / "qwen3_5"
    small_model("qwen3_5", kind=IMAGE_TEXT).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_towers_are_loaded_and_exported_under_the_names_that_were_read(saved, tmp_path):
    model, _ = load_model(saved)
    assert type(model).__name__ == "Qwen3_5ForConditionalGeneration"
    export(model, tmp_path / "exported")
    before, after = tensors(saved), tensors(tmp_path / "exported")
    assert any(name.startswith("model.visual.") for name in before)
    assert any(name.startswith("model.language_model.") for name in before)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        assert (tmp_path / "exported" / name).read_text() == (saved / name).read_text()


def test_names_of_an_older_layout_come_back(saved, tmp_path):
    """transformers renames tensors of older checkpoints when it reads them."""
    from safetensors.torch import save_file

    folder = tmp_path / "older"
    model = small_model("qwen2_vl", kind=IMAGE_TEXT)
    model.save_pretrained(folder)
    old = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors(folder).items()
    }
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    export(load_model(folder)[0], tmp_path / "exported")
    after = tensors(tmp_path / "exported")
    assert set(after) == set(old)
    assert all(torch.equal(old[name], after[name]) for name in old)


def test_an_export_that_would_lose_a_tower_is_refused(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    with pytest.raises(ToolkitError, match=r"must be a Qwen3_5ForConditionalGeneration, .* got a Qwen3_5ForCausalLM"):
        export(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_tensors_that_the_class_does_not_read_are_copied(saved, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "with_mtp"
    folder.mkdir()
    (folder / "config.json").write_text((saved / "config.json").read_text())
    save_file({**tensors(saved), "mtp.fc.weight": torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    path = export(load_model(folder)[0], tmp_path / "exported")
    manifest = json.loads((path / "toolkit_manifest.json").read_text())
    assert manifest["left_out"] is None
    with safe_open(path / "model-00002-of-00002.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("mtp.fc.weight"), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("model_type", "architectures", "opener"),
    [
        ("llama", ["LlamaForCausalLM"], "AutoModelForCausalLM"),
        ("llama", None, "AutoModelForCausalLM"),
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], "AutoModelForMultimodalLM"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        ("qwen3_5", None, "AutoModelForMultimodalLM"),
        ("qwen3_5_text", None, "AutoModelForCausalLM"),
        ("llava", ["LlavaForConditionalGeneration"], "AutoModelForMultimodalLM"),
    ],
)
def test_the_class_that_wrote_a_checkpoint_opens_it(model_type, architectures, opener):
    config = small_config(model_type)
    config.architectures = architectures
    assert auto_class(config).__name__ == opener
