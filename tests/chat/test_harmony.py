"""gpt-oss' replies as reasoning, content and calls, however they are cut, and the grammars of them."""

import json
import random

import pytest

from tests.helpers.model_plans import ModelPlans
from tests.helpers.replies import ARGUMENTS, TOOLS, read_in_parts, shown
from toolkit.chat.reply import CallArguments, CallEnd, ContentText, ReasoningText, ReplyReading, parse_reply, reading_of
from toolkit.chat.reply.families import REASONING, calls_named
from toolkit.chat.tools import Tool, ToolChoice

TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
ANALYSIS = "<|channel|>analysis<|message|>I call it.\nNow."
CALL = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{TEXT}"
ROLE_CALL = f" to=functions.get_weather<|channel|>commentary json<|message|>{TEXT}"
NEXT = "<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>Let me see."
FINAL = "<|channel|>final<|message|>It is <sunny>."
PROMPT = "<|start|>user<|message|>hi<|end|><|start|>assistant"
READING = ReplyReading(calls_named("openai", ""), REASONING["openai_gptoss"])
CALLED = [("get_weather", TEXT)]
REPLIES = {
    ANALYSIS + NEXT + FINAL: ("I call it.\nNow.", "It is <sunny>.", []),
    ANALYSIS + NEXT + CALL: ("I call it.\nNow.", "", CALLED),
    ANALYSIS + NEXT + CALL + "<|call|>": ("I call it.\nNow.", "", CALLED),
    ANALYSIS + NEXT + ROLE_CALL: ("I call it.\nNow.", "", CALLED),
    ROLE_CALL: (None, "", CALLED),
    CALL + "<|call|><|start|>assistant" + CALL: (None, "", CALLED * 2),
    ANALYSIS + NEXT + PREAMBLE + NEXT + CALL: ("I call it.\nNow.", "Let me see.", CALLED),
    PREAMBLE + NEXT + FINAL + "<|return|>": (None, "Let me see.\nIt is <sunny>.", []),
    ANALYSIS + NEXT + ANALYSIS + NEXT + FINAL: ("I call it.\nNow.\nI call it.\nNow.", "It is <sunny>.", []),
    "<|channel|>analysis to=python code<|message|>1 + 1": (None, "", [("python", "1 + 1")]),
    "<|channel|>commentary to=functions.now<|message|><|call|>": (None, "", [("now", "{}")]),
    "Hello": (None, "Hello", []),
    " to the point": (None, " to the point", []),
    ANALYSIS: ("I call it.\nNow.", "", []),
    ANALYSIS + NEXT + "<|channel|>fin": ("I call it.\nNow.", "", []),
    "": (None, "", []),
}


@pytest.mark.parametrize("text", REPLIES)
def test_replies_however_they_are_cut(text):
    whole = parse_reply(READING.parser(PROMPT, TOOLS), text)
    assert shown(whole) == REPLIES[text]
    for seed in range(60):
        reply, _ = read_in_parts(READING.parser(PROMPT, TOOLS), text, random.Random(seed))
        assert shown(reply) == shown(whole)


def test_damaged_text_raises_nothing_and_is_cut_invariant():
    rng = random.Random(0)
    for _ in range(400):
        text = list(ANALYSIS + NEXT + PREAMBLE + NEXT + CALL + "<|call|>")
        for _ in range(rng.randint(0, 4)):
            at = rng.randrange(len(text))
            text[at] = rng.choice(("", "<|", "|>", "{", "<|start|>", "<|message|>", "<|end|>", text[at] * 2))
        damaged = "".join(text)[: rng.randint(1, len(text))]
        whole = parse_reply(READING.parser(PROMPT, TOOLS), damaged)
        reply, _ = read_in_parts(READING.parser(PROMPT, TOOLS), damaged, rng)
        assert shown(reply) == shown(whole), damaged


def test_all_of_it_streams():
    parser = READING.parser(PROMPT, TOOLS)
    assert parser.feed("<|channel|>analysis<|mess") == []
    assert parser.feed("age|>I") == [ReasoningText("I")]
    assert parser.feed(" see.<|en") == [ReasoningText(" see.")]
    assert parser.feed("d|><|start|>assistant<|channel|>final<|message|>It") == [ContentText("It")]
    calling = READING.parser(PROMPT, TOOLS)
    calling.feed(CALL[: CALL.index("days")])
    assert calling.feed('days": 3') == [CallArguments(0, 'days": 3')]
    assert calling.finish() == [CallEnd(0, complete=False)]


def test_a_prompt_that_ends_inside_a_message():
    for channel, expected in (("final", (None, " there", [])), ("analysis", (" there", "", []))):
        parser = READING.parser(f"{PROMPT}<|channel|>{channel}<|message|>Hello", TOOLS)
        assert shown(parse_reply(parser, " there")) == expected


def test_choices_bound_what_is_read():
    text = ANALYSIS + NEXT + CALL + "<|call|><|start|>assistant" + CALL
    assert shown(parse_reply(READING.parser(PROMPT, ()), text))[2] == []
    assert TEXT in parse_reply(READING.parser(PROMPT, TOOLS, ToolChoice("none")), text).content
    assert shown(parse_reply(READING.parser(PROMPT, TOOLS, ToolChoice(parallel=False)), text))[2] == CALLED
    beside = parse_reply(READING.parser(PROMPT, reasoning=False), ANALYSIS + NEXT + FINAL)
    assert shown(beside) == (None, "I call it.\nNow.\nIt is <sunny>.", [])


def test_it_is_recognised_by_the_chat_template():
    reading = reading_of(None, "{{- '<|start|>assistant<|channel|>analysis<|message|>' }}")
    assert reading == READING
    assert reading_of(None, "<|start|>assistant<|channel|>analysis<|message|>", "none").is_harmony
    assert reading_of(None, "<|user|>\n{{ m }}<|end|>") == ReplyReading()
    assert not reading_of(None, "<|channel|>thought\n <|tool_call>call:").is_harmony


MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
PICK = Tool(
    "pick", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, strict=True
)  # fmt: skip
PICKED = '<|channel|>commentary to=functions.pick <|constrain|>json<|message|>{"a": 1}'
WRONG = PICKED.replace("1", '"x"')


@pytest.mark.parametrize("special", [(), MARKERS])
def test_grammars_of_required_strict_and_formed_replies(special):
    served = ModelPlans("openai", *special, reasoning="openai_gptoss")
    required = served.plan([PICK], ToolChoice("required"), PROMPT)
    strict = served.plan([PICK, Tool("now")], ToolChoice(), PROMPT)
    form = {"json": {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}}
    formed = served.plan((), None, PROMPT, structured_outputs=form)
    json_reply = '<|channel|>final<|message|>{"b": 2}'
    now = '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"any": "thing"}'
    for text, allowed in (
        (PICKED, (True, True, False)), (WRONG, (False, False, False)), (ANALYSIS + NEXT + PICKED, (True, True, False)),
        (ANALYSIS + NEXT + PREAMBLE + NEXT + PICKED, (True, True, False)), (now, (False, True, False)),
        (ANALYSIS + NEXT + FINAL, (False, True, False)), (ANALYSIS + NEXT + json_reply, (False, True, True)),
        ('{"b": 2}', (False, False, False)),
    ):  # fmt: skip
        for plan, fine in zip((required, strict, formed), allowed, strict=True):
            assert served.allows(plan, text) == fine, (text, plan.params)
    assert shown(parse_reply(formed.parser(), ANALYSIS + NEXT + json_reply)) == ("I call it.\nNow.", '{"b": 2}', [])
    begun = served.plan([PICK], ToolChoice("required"), f"{PROMPT}<|channel|>analysis<|message|>")
    assert served.allows(begun, f"hm{NEXT}{PICKED}")
    assert not served.allows(begun, PICKED)
    if special:
        kept = served.plan((), None, PROMPT).params["kept_special_tokens"]
        assert set(served.tokenizer.convert_ids_to_tokens(kept)) == set(MARKERS)
