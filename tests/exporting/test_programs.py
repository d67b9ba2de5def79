"""ONNX, OpenVINO and torch.export: each runtime's own generation loop gives the model's greedy tokens."""

import json

import pytest
import torch

from tests.helpers.tokenizers import make_tokenizer
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, export
from toolkit.patching import patch
from toolkit.testing.models import random_model

RUNTIMES = {"torch-export": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


@pytest.mark.sweep
@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_its_runtime_generates_the_models_tokens(family, target, tmp_path):
    for module in RUNTIMES[target]:
        pytest.importorskip(module, reason=f"needs {module}")
    check_tokens(family, target, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_executorch_generates_the_models_tokens(tmp_path):
    pytest.importorskip("executorch", reason="needs executorch")
    check_tokens("llama", "executorch", tmp_path)


def check_tokens(family, target, tmp_path):
    """The manifest's tokens of a small model's export are those that it predicts."""
    torch.manual_seed(0)
    model = random_model(family, hidden=32, layers=2, vocabulary=340)
    patch(model)  # what is exported is the model without it
    prompts = [[5, 6, 7, 8], [200, 9, 13, 30, 41, 77, 8, 12, 99], [3, 4]]
    path = export(model, tmp_path / "out", target, make_tokenizer(), prompts=prompts, max_tokens=8)
    assert (path / "generation_config.json").is_file()
    assert (path / "tokenizer.json").is_file()
    proof = json.loads((path / MANIFEST).read_text())["proof"]
    for prompt, tokens in zip(prompts, proof["outputs"]):
        sequence = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logits = model(sequence).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


def test_a_head_that_generates_nothing_is_refused_by_name(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(ToolkitError, match="'torch-export' holds causal language models, got a LlamaForSequenceClass"):
        export(model, tmp_path / "out", "torch-export")
