"""What a request may cost: bounds that hold before anything is built, and texts that they leave alone."""

import json
import random
import string

import pytest

from toolkit.errors import ToolkitError
from toolkit.serving.limits import MAX_ITEMS, SMALL_BODY, check_structure, give_back_memory
from toolkit.serving.openai.completion_request import CompletionRequest
from toolkit.serving.openai.requests import ChatRequest
from toolkit.serving.parsing import parse

MIB = 2**20
PAD = '"pad": "' + "x" * SMALL_BODY + '"'
"""Makes a body large enough to be looked at."""


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ("[" + "[]," * 2**15 + "1]", "'[' <= 32768 times"),
        ("[" + "{}," * 2**15 + "{}]", "'{' <= 32768 times"),
        ("{" + ",".join(f'"{at}": 1' for at in range(2**16)) + "}", "':' <= 65536 times"),
        ("[" + "1," * 2**19 + "1]", "',' <= 524288 times"),
        ("[" + '"",' * 2**17 + "1]", "'\"' <= 262144 times"),
        ("[" + "9" * 4000 + "]", "numbers of <= 400 digits"),
    ],
)
def test_a_body_that_takes_long_to_parse_is_not_parsed(inner, words, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda raw: pytest.fail("it was parsed"))
    with pytest.raises(ToolkitError) as raised:
        parse(CompletionRequest, f'{{"prompt": {inner}, {PAD}}}'.encode())
    assert words in str(raised.value)


@pytest.mark.parametrize("seed", range(3))
def test_texts_may_hold_as_many_marks_as_they_like(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices('[{:,"\\' + string.digits + "é\n", k=2 * MIB // 3))
    body = json.dumps({"prompt": text, "max_tokens": 1}, ensure_ascii=bool(seed)).encode()
    check_structure(body)
    assert parse(CompletionRequest, body).prompt == [text]


def test_marks_outside_of_texts_are_counted_exactly():
    rows = ",".join(["[" + "1," * 15 + "1]"] * (MAX_ITEMS[b"["] - 1))  # 16 ids a row, 15 commas and one between
    text = r"\" [ \\"  # an escaped quote, and a backslash before the closing one
    body = f'{{"prompt":[{rows}],"x":"{text}","pad":{"[" * 0}1}}'.encode()
    assert body.count(b"[") == MAX_ITEMS[b"["] + 1
    assert len(body) > SMALL_BODY
    check_structure(body)


def test_a_lone_request_of_the_largest_size_is_parsed():
    ids = list(range(100_000))
    assert parse(CompletionRequest, json.dumps({"prompt": ids}).encode()).prompt == [ids]
    chat = [{"role": "user", "content": [{"type": "text", "text": "a" * 100}] * 8}] * 2048
    assert len(parse(ChatRequest, json.dumps({"messages": chat}).encode()).messages) == 2048


def test_memory_is_given_back_without_an_error():
    give_back_memory()
