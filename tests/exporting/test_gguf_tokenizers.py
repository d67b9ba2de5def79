"""llama.cpp's tokens of a text are the tokenizer's, and Ollama's template writes what the chat template writes."""

import json
import re

import pytest

from tests.helpers.texts import mixed_texts
from tests.helpers.tokenizers import CHATML, make_tokenizer
from toolkit.errors import ToolkitError
from toolkit.exporting import export
from toolkit.exporting.gguf.modelfile import go_template, modelfile, template_parts
from toolkit.exporting.gguf.vocabulary import read_vocabulary
from toolkit.loading.gguf_pre_tokenizers import PRE_TOKENIZERS
from toolkit.testing.models import random_model

pytest.importorskip("gguf")
SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}" + CHATML


def splitting(name, **tokens):
    """A tokenizer that splits as GGUF's ``name`` says."""
    from tokenizers import Tokenizer

    tokenizer = make_tokenizer("byte_level", **tokens)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["pre_tokenizer"], backend["model"]["ignore_merges"] = PRE_TOKENIZERS[name]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return random_model("llama", hidden=32, layers=1, vocabulary=440)


CASES = {
    **{name: (lambda name=name: splitting(name)) for name in PRE_TOKENIZERS},
    "with bos": lambda: make_tokenizer("byte_level", around="<s> $A"),
    "with bos and eos": lambda: make_tokenizer("byte_level", around="<s> $A </s>"),
    "llama 2": lambda: make_tokenizer("llama", around="<s> $A"),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_makes_the_same_tokens(case, model, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, which opens GGUF files")
    from toolkit.exporting.gguf.consumer import LlamaCpp

    tokenizer = CASES[case]()
    path = export(model, tmp_path / "out", "gguf", tokenizer)
    texts = mixed_texts()
    with LlamaCpp(path / "model.gguf", 16) as server:
        different = [text for text in texts if server.tokenize(text) != tokenizer(text)["input_ids"]]
    assert not different, [(text, tokenizer(text).tokens()) for text in different[:3]]


def test_a_conversation_has_the_same_text_in_llama_cpp(model, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, which opens GGUF files")
    from toolkit.exporting.gguf.consumer import LlamaCpp

    tokenizer = make_tokenizer(chat_template=SYSTEM, eos_token="<|im_end|>")
    messages = [{"role": "user", "content": "hello"}]
    with LlamaCpp(export(model, tmp_path / "out", "gguf", tokenizer) / "model.gguf", 16) as server:
        theirs = server.render(messages)
    assert theirs == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


REFUSED = [
    (lambda: make_tokenizer("unigram"), "its model must be BPE, got Unigram"),
    (lambda: make_tokenizer("wordpiece"), "its model must be BPE, got WordPiece"),
    (lambda: make_tokenizer("prefix_space"), "how it splits texts must be one of gpt-2, smollm, .*, got"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused_by_name(make, sentence):
    with pytest.raises(ToolkitError, match=f"An export to 'gguf' cannot hold the tokenizer: {sentence}"):
        read_vocabulary(make(), 440, "gguf")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused():
    with pytest.raises(ToolkitError, match="its ids must be below the 300 rows of the embedding"):
        read_vocabulary(make_tokenizer("byte_level"), 300, "gguf")


def test_rows_beyond_the_tokenizer_are_unused_tokens():
    vocabulary = read_vocabulary(make_tokenizer("byte_level"), 342, "gguf")
    assert vocabulary.tokens[340:] == ["[PAD340]", "[PAD341]"]
    assert vocabulary.types[340:] == [5, 5]


CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be nice."), ("user", "Hi")],
    [("user", "a {b}"), ("assistant", "c\nd"), ("user", "e")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
]


def filled(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's engine makes of the subset that is written: one conditional, one range with branches by role."""
    match = re.fullmatch(
        r'(?:\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(.*?)\{\{ end \}\})?\{\{ range \.Messages \}\}(.*)'
        r"\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S
    )  # fmt: skip
    assert match
    branches = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', match[2], re.S))
    text = (match[1] or "") if messages[0]["role"] != "system" else ""
    return (
        text + "".join(branches[one["role"]].replace("{{ .Content }}", one["content"]) for one in messages) + match[3]
    )


@pytest.mark.parametrize("template", [CHATML, SYSTEM])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ollamas_template_writes_the_same_text(template, conversation):
    tokenizer = make_tokenizer(chat_template=template)
    messages = [{"role": role, "content": content} for role, content in conversation]
    parts = template_parts(tokenizer)
    assert parts is not None
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert filled(go_template(parts), messages) == expected


def test_a_template_that_does_more_is_left_to_ollama(model):
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ loop.index }}: {{ m.content }}{% endfor %}")
    assert template_parts(tokenizer) is None
    assert "TEMPLATE" not in modelfile("model.gguf", model, tokenizer)


def test_the_modelfile_has_stops_and_sampling(model):
    tokenizer = make_tokenizer(chat_template=CHATML, eos_token="<|im_end|>")
    model.generation_config.temperature = 0.6
    lines = modelfile("model.gguf", model, tokenizer)
    assert lines.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"\n' in lines
    assert 'PARAMETER stop "</s>"\n' in lines
    assert "PARAMETER temperature 0.6\n" in lines
