"""``toolkit generate`` on a tiny model: what it shows is what the engine gives."""

import io
import re
import sys

import pytest

from toolkit.cli import main
from toolkit.cli.generate import VISIBLE
from toolkit.testing.models import random_model

PROMPTS = ["def main", "class Queue", "import"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: 3 + index for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, **vocabulary}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("models") / "bytes"
    random_model("llama", vocabulary=259).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def completions(saved):
    """What the engine gives for all three prompts, sampled with seed 5."""
    from toolkit.engine import Engine, SamplingParams
    from toolkit.loading import load_model

    with Engine(*load_model(saved)) as engine:
        return engine.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0.8, seed=5))


def shown(capsys, *words):
    assert main(["generate", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 3])
def test_every_prompt_is_shown_with_its_continuation(saved, completions, capsys, count):
    out = shown(capsys, saved, *PROMPTS[:count], "--max-tokens", "12", "--temperature", "0.8", "--seed", "5")
    completions = completions[:count]
    end = 0
    for prompt, completion in zip(PROMPTS, completions):
        text = (prompt + completion.text).translate(VISIBLE)
        ending = f"\n({len(completion.token_ids)} tokens, ended by {completion.finish_reason})\n"
        end = out.index(text + ending, end) + len(text)
    tokens = sum(len(completion.token_ids) for completion in completions)
    assert re.search(rf"\n{tokens} tokens for {count} prompts? in [\d.]+ s, [\d.]+ tokens/s\n$", out)


def test_a_prompt_may_come_from_standard_input(saved, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os"))
    assert shown(capsys, saved, "--max-tokens", "2").startswith("import os")


def test_what_steers_terminals_is_shown_as_text():
    assert "a\x1b[2J\n\tb\x9b\r".translate(VISIBLE) == r"a\x1b[2J" + "\n\tb" + r"\x9b\x0d"
