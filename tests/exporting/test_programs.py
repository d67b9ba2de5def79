"""torch.export: its generation loop gives the model's greedy tokens; other runtimes are soaked in an environment."""

import json

import pytest
import torch

from tests.helpers.tokenizers import make_tokenizer
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, export
from toolkit.patching import patch
from toolkit.testing.models import random_model


@pytest.mark.sweep
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_its_programs_generate_the_models_tokens(family, tmp_path):
    torch.manual_seed(0)
    model = random_model(family, hidden=32, layers=2, vocabulary=340)
    patch(model)  # what is exported is the model without it
    prompts = [[5, 6, 7, 8], [200, 9, 13, 30, 41, 77, 8, 12, 99], [3, 4]]
    path = export(model, tmp_path / "out", "torch-export", make_tokenizer(), prompts=prompts, max_tokens=8)
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
