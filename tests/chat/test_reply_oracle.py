"""Replies as transformers' own parser reads them, by the response templates of its server and by a tokenizer's."""

import json
import random

import pytest

from tests.helpers.replies import ARGUMENTS, CALLS, TOOLS, read_in_parts, shown
from tests.helpers.tokenizers import CHATML, make_tokenizer
from toolkit.chat.reply import ReplyParser, parse_reply, reading_of
from toolkit.chat.reply.families import REASONING, calls_named

TEMPLATES = pytest.importorskip("transformers.cli.serving.utils")._RESPONSE_TEMPLATE_FALLBACKS
TEMPLATE = {family: template for families, template in TEMPLATES.items() for family in families}
CASES = {"hermes": ("qwen3", "qwen3"), "qwen3_coder": ("qwen3_5", "qwen3"), "gemma4": ("gemma4", "gemma4")}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("content", ["", "Let me see."])
@pytest.mark.parametrize("reasoning", [None, "I call it.\nNow."])
@pytest.mark.parametrize("calls", [True, False])
def test_our_families_read_what_transformers_reads(name, content, reasoning, calls):
    from transformers.utils.chat_parsing import parse_response

    model_type, reasoning_name = CASES[name]
    marks = REASONING[reasoning_name]
    text = "" if reasoning is None else f"{marks.begin}{reasoning}{marks.end}"
    text += content + (CALLS[name] if calls else "")
    expected = parse_response(text, TEMPLATE[model_type], prefix="", tools=[tool.for_template() for tool in TOOLS])
    reply = parse_reply(ReplyParser(calls_named(name, ""), marks, TOOLS), text)
    assert reply.content == expected.get("content", "")
    assert reply.reasoning == expected.get("reasoning_content")
    found = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in reply.calls]
    assert found == [one["function"] for one in expected.get("tool_calls", [])]


@pytest.fixture
def tokenizer():
    made = make_tokenizer(chat_template=CHATML)
    made.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<r>", "close": "</r>"},
            "tool_calls": {
                "open": "<c>", "close": "</c>", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<|im_end|>"},
        },
    }  # fmt: skip
    return made


def test_a_tokenizers_own_response_template_reads_its_replies(tokenizer):
    reading = reading_of(tokenizer, "{{ messages }}")
    assert reading.reads_calls
    assert reading.reads_reasoning
    assert set(tokenizer.convert_ids_to_tokens(reading.kept_tokens(tokenizer))) == {"<|im_start|>", "<|im_end|>"}
    prompt = "<|im_start|>assistant\n<r>"
    text = 'hm</r>So:<c>{"name": "get_weather", "arguments": ' + json.dumps(ARGUMENTS) + "}</c>"
    whole = parse_reply(reading.parser(prompt, TOOLS), text)
    assert (whole.reasoning, whole.content) == ("hm", "So:")
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == [("get_weather", ARGUMENTS)]
    for seed in range(50):
        reply, _ = read_in_parts(reading.parser(prompt, TOOLS), text, random.Random(seed))
        assert shown(reply) == shown(whole)


def test_what_transformers_cannot_parse_is_content(tokenizer):
    reading = reading_of(tokenizer, "{{ messages }}")
    for text in ("So: <c>oops</c> yes", '<c>{"name": "now"', '<c>{"nom": 1}</c>'):
        reply, _ = read_in_parts(reading.parser("", TOOLS), text, random.Random(0))
        assert (reply.content, reply.calls) == (text, [])


def test_a_family_streams_the_arguments_that_a_response_template_has_in_the_same_markers(tokenizer):
    tokenizer.response_template = TEMPLATE["qwen3"]
    reading = reading_of(tokenizer, "<tool_call> <think>")
    assert reading.shipped is None
    assert reading.calls == calls_named("hermes", "")
