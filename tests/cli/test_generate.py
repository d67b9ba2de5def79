"""``toolkit generate`` on a tiny model: what it shows is what the engine gives."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture
def configured(saved, tmp_path):
    """A folder with a generation configuration that samples differently and ends texts by either of two tokens."""
    fields = {
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "max_new_tokens": 5,
        "do_sample": True,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps({**fields, "eos_token_id": [2, 258]}))
    return str(tmp_path)


def tokens_of(out):
    return int(re.search(r"\((\d+) tokens, ended by", out)[1])


def test_the_checkpoints_sampling_defaults_are_used_and_said(saved, configured, capsys):
    from toolkit.engine import Engine, SamplingParams
    from toolkit.loading import load_model

    words = [saved, "def main", "--generation-config", configured, "--seed", "5"]
    assert main(["generate", *words]) == 0
    out, err = capsys.readouterr()
    assert err == (
        f"sampling defaults from generation_config.json of '{configured}': temperature 0.7, top_k 9, top_p 0.95, "
        "repetition_penalty 1.2, max_tokens 5 (none with --generation-config vllm)\n"
    )
    model, tokenizer = load_model(saved)
    with Engine(model, tokenizer) as engine:
        params = SamplingParams(
            temperature=0.7, top_k=9, top_p=0.95, repetition_penalty=1.2, max_tokens=5, seed=5, stop_token_ids=[258]
        )
        completion = engine.generate(["def main"], params)[0]
    assert ("def main" + completion.text).translate(VISIBLE) in out
    assert tokens_of(out) == len(completion.token_ids)
    assert tokens_of(shown(capsys, *words, "--max-tokens", "9", "--temperature", "0")) > 5
    assert tokens_of(shown(capsys, saved, "def main", "--generation-config", "vllm", "--seed", "5")) > 5


def test_a_default_length_is_what_fits(saved, configured, capsys):
    fields = json.loads((Path(configured) / "generation_config.json").read_text())
    text = json.dumps({**fields, "max_new_tokens": 100_000, "temperature": 0})
    (Path(configured) / "generation_config.json").write_text(text)
    out = shown(capsys, saved, "a" * 500, "--generation-config", configured)
    assert tokens_of(out) <= 12  # of 512


def test_every_end_of_text_token_of_a_list_ends_a_text(saved, configured):
    from toolkit.engine import Engine
    from toolkit.loading import load_model, sampling_defaults

    model, tokenizer = load_model(saved)
    sampling_defaults(model, configured)
    with Engine(model, tokenizer) as engine:
        assert engine.backend.eos == {2, 258}


@pytest.mark.parametrize(
    ("fields", "words"),
    [(None, "got '{folder}'"), ('{"top_p": 7}', "top_p must be"), ("{", "generation_config.json in '{folder}' cannot")],
)
def test_an_unusable_generation_config_is_one_sentence(saved, tmp_path, capsys, fields, words):
    if fields is not None:
        (tmp_path / "generation_config.json").write_text(fields)
    assert main(["generate", saved, "a", "--generation-config", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert words.format(folder=tmp_path) in err
    assert err.count("\n") == 1


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("locale", [{"LC_ALL": "C.UTF-8"}, ASCII], ids=["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        ([b"fine", b"a\xffb"], b"", "prompt 2 must be UTF-8 text, got the byte 0xff at byte 1;"),
        ([], b"ab\xc3", "standard input must be UTF-8 text, got the byte 0xc3 at byte 2;"),
    ],
)
def test_text_that_is_not_utf8_is_one_sentence(arguments, given, words, locale):
    command = [sys.executable, "-m", "toolkit.cli", "generate", "no-model", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, env={**os.environ, **locale}, timeout=60)
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"toolkit: {words}")
    assert done.stderr.count(b"\n") == 1


def test_a_terminal_that_knows_only_ascii_shows_codes(saved, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    as_ascii_locale_gives_it = "é 😀".encode().decode("ascii", "surrogateescape")
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert main(["generate", saved, as_ascii_locale_gives_it, "--max-tokens", "8", "--seed", "3"]) == 0
    out.flush()
    assert out.buffer.getvalue().startswith(rb"\xe9 \U0001f600")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_standard_input_is_utf8_in_any_locale(saved, capsys, monkeypatch, mark):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{mark}é 😀".encode()), encoding="ascii"))
    assert shown(capsys, saved, "--max-tokens", "2").startswith("é 😀")
