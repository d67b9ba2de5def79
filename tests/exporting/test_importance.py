"""Importances of columns (llama.cpp's imatrix): computed from a text, read from a file, and what they are for."""

import json

import numpy as np
import pytest
import torch

from tests.helpers.tokenizers import make_tokenizer
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, export
from toolkit.loading import load_model
from toolkit.testing.models import random_model

pytest.importorskip("gguf")
libgguf = pytest.importorskip("libgguf", reason="needs libgguf, which rounds by importances")

TEXT = "the quick brown fox jumps over the lazy dog. two plus two is four. hello world 0123456789 " * 6


def uneven_model():
    """One whose layers read columns of very different sizes."""
    model = random_model("llama", hidden=64, vocabulary=340)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.logspace(-2, 1, len(parameter))[torch.randperm(len(parameter))])
    return model


def inputs_of(model, ids):
    """Of each linear layer its inputs [tokens, columns], float64."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(
                module.register_forward_hook(
                    lambda module, given, out, name=name: found.update({name: given[0].flatten(0, -2).double()})
                )
            )
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


def test_they_are_mean_squares_of_a_texts_activations_and_lower_the_error_of_products(tmp_path):
    model, tokenizer = uneven_model(), make_tokenizer()
    (tmp_path / "text.txt").write_text(TEXT)
    plain = export(model, tmp_path / "plain", "gguf", tokenizer, "q4_0")
    weighed = export(model, tmp_path / "weighed", "gguf", tokenizer, "q4_0", imatrix=tmp_path / "text.txt")
    assert json.loads((weighed / MANIFEST).read_text())["imatrix"] == "text.txt"
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) < model.config.max_position_embeddings, "one chunk"
    inputs = inputs_of(model, ids)
    importances = libgguf.load_imatrix(weighed / "imatrix.gguf")
    assert len(importances) == 7 * model.config.num_hidden_layers  # the head has none
    up = importances["blk.1.ffn_up.weight"]
    assert np.allclose(up, inputs["model.layers.1.mlp.up_proj"].square().mean(0).numpy(), rtol=1e-4)
    errors = []
    for path in (plain, weighed):
        rounded = load_model(str(path / "model.gguf"))[0]
        error = 0.0
        for name, x in inputs.items():
            if name != "lm_head":
                difference = (rounded.get_submodule(name).weight - model.get_submodule(name).weight).double()
                error += (x @ difference.T).square().sum().item()
        errors.append(error)
    assert errors[1] < 0.8 * errors[0], errors
    again = export(model, tmp_path / "again", "gguf", tokenizer, "q4_0", imatrix=weighed / "imatrix.gguf")
    assert (again / "model.gguf").read_bytes() == (weighed / "model.gguf").read_bytes()
    other = random_model("llama", hidden=32, vocabulary=340)
    with pytest.raises(ToolkitError, match=r"imatrix must be of this model, got .* which has"):
        export(other, tmp_path / "other", "gguf", tokenizer, "q4_0", imatrix=weighed / "imatrix.gguf")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_taken_is_a_sentence(tmp_path):
    model, tokenizer = random_model("llama", hidden=32, layers=1, vocabulary=340), make_tokenizer()
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    refused = [
        ("hf", None, "text.txt", "imatrix must not be given for 'hf'"),
        ("gguf", "q8_0", "text.txt", "imatrix must not be given for quantise 'q8_0' of 'gguf'"),
        ("gguf", "q4_0", "none.txt", "imatrix must be a GGUF file of importances or a text file"),
        ("gguf", "q4_0", "bytes.bin", "which is neither"),
        ("gguf", "q4_0", "broken.gguf", "imatrix must hold importances"),
        ("gguf", "q4_0", "text.txt", "imatrix must be a text of two tokens or more"),
    ]
    for to, form, name, sentence in refused:
        with pytest.raises(ToolkitError, match=sentence):
            export(model, tmp_path / "out", to, tokenizer, form, imatrix=tmp_path / name)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["q6_k", "q5_k", "q4_k", "q4_0", "q5_0", "q5_1"])
def test_every_matrix_of_a_tensor_is_rounded_by_its_own_importances(form):
    from toolkit.exporting.gguf.formats import encoded, ggml_type

    torch.manual_seed(0)
    weights = torch.randn(2, 8, 256)
    importance = torch.logspace(-4, 4, 256)[torch.stack([torch.randperm(256) for _ in range(2)])].numpy()
    plain, weighed = encoded(weights, form), encoded(weights, form, importance)
    assert plain.shape == weighed.shape
    errors = []
    for rows in (plain, weighed):
        values = libgguf.dequantize_rows(rows.reshape(16, -1), int(ggml_type(form))).reshape(weights.shape)
        errors.append(((values - weights.numpy()) ** 2 * importance[:, None]).sum((1, 2)))
    assert (errors[1] < errors[0]).all(), errors
