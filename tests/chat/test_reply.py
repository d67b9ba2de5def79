"""Replies as reasoning, content and calls: every family, however the text is cut, and text that is no call."""

import json
import random

import pytest

from tests.helpers.replies import ARGUMENTS, CALLS, TOOLS, family_of, read_in_parts, shown
from toolkit.chat.reply import CallArguments, CallEnd, ContentText, ReplyParser, ReplyReading, parse_reply, reading_of
from toolkit.chat.reply.families import CALLS as FORMATS
from toolkit.chat.reply.families import REASONING, calls_named, calls_of
from toolkit.chat.tools import Tool, ToolChoice
from toolkit.errors import ToolkitError

THINK = REASONING["qwen3"]
HERMES = calls_named("hermes", "")


def format_of(case: str):
    return calls_named(family_of(case), "")


def test_every_family_has_a_case():
    assert {family_of(case) for case in CALLS} | {"qwen3_xml", "glm47", "openai"} == set(FORMATS)


@pytest.mark.parametrize("case", CALLS)
def test_calls_of_every_family(case):
    reply = parse_reply(ReplyParser(format_of(case), tools=TOOLS), CALLS[case])
    assert [call.name for call in reply.calls] == ["get_weather", "now"]
    assert [json.loads(call.arguments) for call in reply.calls] == [ARGUMENTS, {}]
    assert (reply.reasoning, reply.content) == (None, "")
    assert len({call.id for call in reply.calls}) == 2


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("around", ["", "<think>\nI will <call> it.\n</think>\n\n", "Let me see.\n\n"])
def test_the_cuts_of_the_text_change_nothing(case, around):
    form = format_of(case)
    if form.bare and not around.startswith("<think>"):
        around = ""
    text = around + CALLS[case]
    whole = shown(parse_reply(ReplyParser(form, THINK, TOOLS), text))
    assert len(whole[2]) == 2
    assert whole[:2] == ("I will <call> it.", "") if "<think>" in around else (None, around.strip())
    for seed in range(60):
        reply, _ = read_in_parts(ReplyParser(form, THINK, TOOLS), text, random.Random(seed))
        assert shown(reply) == whole


@pytest.mark.parametrize("case", CALLS)
def test_damaged_text_is_cut_invariant_and_not_lost(case):
    form = format_of(case)
    rng = random.Random(case)
    whole_text = CALLS[case]
    for _ in range(150):
        text = list(whole_text)
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(text))
            text[at] = rng.choice(("", "{", "}", '"', "<", "\\", "x", "[", text[at] * 2))
        damaged = "".join(text)[: rng.choice((len(text), rng.randint(1, len(text))))]
        if rng.random() < 0.3:
            damaged += rng.choice((" and more", whole_text, "<tool", "\n"))
        whole = parse_reply(ReplyParser(form, THINK, TOOLS), damaged)
        for _ in range(4):
            reply, _ = read_in_parts(ReplyParser(form, THINK, TOOLS), damaged, rng)
            assert shown(reply) == shown(whole), damaged
        if not whole.calls and whole.reasoning is None:
            assert whole.content == damaged


@pytest.mark.parametrize("case", [case for case in CALLS if not format_of(case).begins or "json" in case])
def test_json_and_lists_that_call_no_tool_are_content(case):
    for text in ('{"city": "Rome"}', '{"name": "Bob", "age": 3}', "[1, 2]", "[f(x)]", "{", "[now(", '{"name": "x'):
        assert shown(parse_reply(ReplyParser(format_of(case), tools=TOOLS), text)) == (None, text, [])


def test_arguments_and_text_stream_as_they_grow():
    parser = ReplyParser(HERMES, THINK, TOOLS)
    assert parser.feed("Hello") == [ContentText("Hello")]
    assert parser.feed(" <tool") == []
    assert parser.feed("s>") == [ContentText(" <tools>")]
    assert parser.feed('<tool_call>{"name": "now", "argu') == []
    assert [type(one).__name__ for one in parser.feed('ments": {"a": "b')] == ["CallBegin", "CallArguments"]
    assert parser.feed("c") == [CallArguments(0, "c")]
    assert parser.feed('"}') == [CallArguments(0, '"}')]
    assert parser.feed("}</tool_call>") == [CallEnd(0)]
    assert parser.finish() == []


def test_strings_between_tags_stream():
    parser = ReplyParser(calls_named("qwen3_coder", ""), tools=TOOLS)
    parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\nRo")
    assert parser.feed('m"e\n') == [CallArguments(0, 'm\\"e')]
    assert parser.feed("x") == [CallArguments(0, "\\nx")]
    assert parser.feed("\n</parameter>\n</function>")[-1] == CallEnd(0)


def test_a_call_that_is_cut_off_ends_incomplete():
    events = ReplyParser(HERMES, tools=TOOLS)
    text = '<tool_call>{"name": "now", "arguments": {"a": [1'
    found = [*events.feed(text), *events.finish()]
    assert found[-1] == CallEnd(0, complete=False)
    assert shown(parse_reply(ReplyParser(HERMES, tools=TOOLS), text))[2] == [("now", '{"a": [1')]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>oops</tool_call> no", (None, "<tool_call>oops</tool_call> no", [])),
        ('<tool_call>{"name": "now", "arguments": {}}}</tool_call>', (None, "}", [("now", "{}")])),
        ('<tool_call>{"name": "now"}</tool_call>', (None, "", [("now", "{}")])),
        ('<tool_call>{"name": "now", "arguments": null}', (None, "", [("now", "{}")])),
        ('<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}', (None, "", [("now", '{"a": 1}')])),
        ('<tool_call>{"arguments": {"a": 1}, "name": "now"}', (None, "", [("now", '{"a": 1}')])),
        ("<think>only", ("only", "", [])),
        ("<think></think>\n\nyes", (None, "yes", [])),
        ("  spaces stay \n", (None, "  spaces stay \n", [])),
        ("a </think> b", (None, "a </think> b", [])),
    ],
)
def test_texts_at_the_edge(text, expected):
    assert shown(parse_reply(ReplyParser(HERMES, THINK, TOOLS), text)) == expected


def test_a_prompt_that_begins_the_reasoning():
    reading = ReplyReading(HERMES, THINK)
    begun = reading.parser("<|im_start|>assistant\n<think>\n", TOOLS)
    assert shown(parse_reply(begun, 'hm\n</think>\n\n<tool_call>{"name": "now"}</tool_call>')) == (
        "hm",
        "",
        [("now", "{}")],
    )
    ended = reading.parser("<|im_start|>assistant\n<think>\n\n</think>\n\n", TOOLS)
    assert shown(parse_reply(ended, "yes")) == (None, "yes", [])
    beside = reading.parser("<think>\n", TOOLS, reasoning=False)
    assert shown(parse_reply(beside, "hm</think>yes")) == (None, "hm</think>yes", [])


def test_choices_bound_what_is_read():
    text = CALLS["hermes"]
    reading = ReplyReading(HERMES)
    assert shown(parse_reply(reading.parser("", ()), text)) == (None, text, [])
    assert shown(parse_reply(reading.parser("", TOOLS, ToolChoice("none")), text)) == (None, text, [])
    one = parse_reply(reading.parser("", TOOLS, ToolChoice(parallel=False)), text)
    assert [call.name for call in one.calls] == ["get_weather"]
    assert one.content == ""


def test_ids_that_chat_templates_check():
    mistral = parse_reply(ReplyParser(format_of("mistral"), tools=TOOLS), CALLS["mistral"])
    assert all(len(call.id) == 9 and call.id.isalnum() for call in mistral.calls)
    kimi = parse_reply(ReplyParser(format_of("kimi_k2"), tools=TOOLS), CALLS["kimi_k2"])
    assert [call.id for call in kimi.calls] == ["functions.get_weather:0", "functions.now:1"]


def test_types_of_values_between_tags():
    schema = {
        "type": "object",
        "properties": {
            "text": {"type": "string"}, "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "ref": {"$ref": "#/$defs/N"}, "flag": {"type": "boolean"}, "size": {"enum": [1, 2]},
        },
        "$defs": {"N": {"type": "number"}},
    }  # fmt: skip
    given = {"text": "12", "maybe": "null", "ref": "2.50", "flag": "True", "size": "2", "other": "7"}
    text = "<tool_call>f\n" + "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in given.items()
    )
    parser = ReplyParser(calls_named("glm45", ""), tools=[Tool("f", parameters=schema)])
    (call,) = parse_reply(parser, text + "</tool_call>").calls
    assert call.arguments == ('{"text": "12", "maybe": null, "ref": 2.50, "flag": true, "size": 2, "other": "7"}')


def test_families_are_recognised_by_their_chat_templates():
    for template, name in (
        ('{{ \'<tool_call>\n{"name": "\' }}', "hermes"),
        ("<tool_call>\n<function=example><parameter=p>", "qwen3_coder"),
        ("<tool_call>{{ name }}<arg_key>", "glm45"),
        ("<|tool_call>call:", "gemma4"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜>```json", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<|start_header_id|><|python_tag|>", "llama3_json"),
        ("<|tool_call|>", "granite"),
    ):
        found = calls_of(template)
        assert found is not None
        assert found[0] == name
    assert calls_of("{{ messages }}") is None
    assert reading_of(None, "<tool_call> <think>").reasoning == THINK
    assert not reading_of(None, "<tool_call> <think>", "none", "none").reads_calls
    assert not reading_of(None, None).reads_reasoning


@pytest.mark.parametrize("field", ["tool_call_parser", "reasoning_parser"])
def test_unknown_names_are_errors_with_the_known_ones(field):
    with pytest.raises(ToolkitError, match=f"{field} must be one of 'auto', 'none', .*got 'x'"):
        reading_of(None, None, **{field: "x"})


def test_long_whitespace_is_kept_whole():
    parser = ReplyParser(HERMES, THINK, TOOLS)
    events = [event for _ in range(20_000) for event in parser.feed(" \n")]
    assert events == []
    assert parser.feed("x") == [ContentText(" \n" * 20_000 + "x")]
