"""Grammars of tool calls: what they allow is a call of the family whose arguments satisfy the tool's schema."""

import json

import numpy as np
import pytest

from tests.helpers.grammar import random_text
from tests.helpers.json_schemas import violation
from tests.helpers.model_plans import ModelPlans
from tests.helpers.replies import ARGUMENTS, CALLS, TOOLS
from toolkit.chat.reply import parse_reply
from toolkit.chat.tools import Tool, ToolChoice
from toolkit.errors import ToolkitError
from toolkit.serving.errors import RequestError

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"type": "integer"},
        "kind": {"enum": ["a", "b c"]},
        "flag": {"type": ["boolean", "null"]},
        "path": {
            "type": "array",
            "items": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        },
    },
    "required": ["size", "kind"],
    "additionalProperties": False,
}
PICK = Tool("pick", "Pick one.", SCHEMA, strict=True)
WRITTEN = {case: text for case, text in CALLS.items() if case not in ("llama3_json, marked", "llama4_json", "pythonic")}
WRITTEN["llama4_pythonic"] = f"<|python_start|>{CALLS['llama4_pythonic']}<|python_end|>"
WRITTEN["pythonic"] = CALLS["llama4_pythonic"]
WRITTEN["llama4_json"] = CALLS["llama3_json"]


@pytest.mark.parametrize("case", WRITTEN)
def test_required_allows_the_familys_calls_and_nothing_else(case):
    served = ModelPlans(case)
    plan = served.plan(TOOLS, ToolChoice("required"))
    assert served.allows(plan, WRITTEN[case])
    for text in ("Hello", "", " " + WRITTEN[case], WRITTEN[case] + "Hello", WRITTEN[case].replace("now", "was")):
        assert not served.allows(plan, text)
    reply = parse_reply(plan.parser(), WRITTEN[case])
    assert [json.loads(call.arguments) for call in reply.calls] == [ARGUMENTS, {}]


@pytest.mark.parametrize("case", WRITTEN)
def test_one_function_is_one_call_of_it(case):
    served = ModelPlans(case)
    named = served.plan(TOOLS, ToolChoice.function("now"))
    assert not served.allows(named, WRITTEN[case])
    one = served.plan(TOOLS[:1], ToolChoice("required", parallel=False))
    assert not served.allows(one, WRITTEN[case])
    wrong = WRITTEN[case].replace("days", "size")
    assert "string" in case or not served.allows(served.plan([PICK], ToolChoice("required")), wrong)


@pytest.mark.parametrize("case", WRITTEN)
def test_random_outputs_are_calls_that_satisfy_the_schema(case):
    served = ModelPlans(case)
    rng = np.random.default_rng(0)
    plan = served.plan([PICK], ToolChoice("required"))
    ended = 0
    for _ in range(30):
        text = random_text(served.matcher(plan), served.tokenizer, len(served.tokenizer), 2, rng, 500)
        if text is None:
            continue
        ended += 1
        reply = parse_reply(plan.parser(), text)
        assert reply.calls, text
        assert not reply.content, text
        for call in reply.calls:
            assert call.name == "pick"
            assert violation(SCHEMA, call.arguments) is None, (text, call.arguments)
    assert ended >= 4


@pytest.mark.parametrize(
    "marks", [(), ("<tool_call>", "</tool_call>"), ("<tool_call>", "</tool_call>", "<think>", "</think>")]
)
def test_reasoning_may_come_before_calls(marks):
    served = ModelPlans("hermes", *marks, reasoning="qwen3")
    required = ToolChoice("required")
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for prompt, texts in (
        ("assistant\n", {call: True, f"<think>\nhm\n</think>\n\n{call}": True, f"hm</think>{call}": False}),
        ("assistant\n<think>\n", {call: False, f"hm\n</think>\n\n{call}": True, "hm</think>": False}),
        ("assistant\n<think>\n\n</think>\n\n", {call: True, f"<think>\nhm\n</think>\n\n{call}": False}),
    ):
        plan = served.plan(TOOLS, required, prompt)
        for text, fine in texts.items():
            assert served.allows(plan, text) == fine, (prompt, text)
            if fine:
                assert [one.name for one in parse_reply(plan.parser(), text).calls] == ["now"]


@pytest.mark.parametrize("marks", [(), ("<tool_call>", "</tool_call>", "<think>", "</think>")])
@pytest.mark.parametrize("prompt", ["assistant\n", "assistant\n<think>\n"])
def test_strict_tools_that_the_model_chooses_to_call(marks, prompt):
    served = ModelPlans("hermes", *marks, reasoning="qwen3")
    plan = served.plan([PICK, Tool("now")], ToolChoice(), prompt)
    good = '<tool_call>\n{"name": "pick", "arguments": {"size": 1, "kind": "a"}}\n</tool_call>'
    bad = good.replace("1", '"x"')
    loose = '<tool_call>\n{"name": "now", "arguments": {"any": ["thing"]}}\n</tool_call>'
    begin = "hm</think>\n\n" if "think" in prompt else ""
    for text, fine in (
        (good, True),
        ("Hello", True),
        (f"Hello {good}\n{loose} there", True),
        (bad, False),
        (loose, True),
    ):
        assert served.allows(plan, begin + text) == fine, text
    assert "structured_outputs" not in served.plan([Tool("now")], ToolChoice(), prompt).params


@pytest.mark.parametrize("case", ["qwen3_coder", "glm45", "gemma4", "deepseek_v3", "mistral", "minimax_m2", "kimi_k2"])
def test_strict_tools_in_other_families(case):
    served = ModelPlans(case)
    plan = served.plan([Tool(one.name, one.description, one.parameters, strict=True) for one in TOOLS], ToolChoice())
    assert served.allows(plan, f"Let me see.\n{WRITTEN[case]}")
    assert not served.allows(plan, f"Let me see.\n{WRITTEN[case]}".replace("now", "was"))


def test_content_in_a_form_beside_calls_and_behind_reasoning():
    served = ModelPlans("hermes", reasoning="qwen3")
    form = {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    both = served.plan(TOOLS, ToolChoice(), structured_outputs=form)
    for text, fine in ((call, True), ('{"a": 1}', True), ('{"a": "x"}', False), ("Hello", False)):
        assert served.allows(both, text) == fine
    begun = served.plan((), None, "<think>\n", structured_outputs=form)
    assert served.allows(begun, 'hm</think>\n{"a": 1}')
    assert not served.allows(begun, '{"a": 1}')
    reply = parse_reply(begun.parser(), 'hm</think>\n{"a": 1}')
    assert (reply.reasoning, reply.content) == ("hm", '{"a": 1}')


def test_other_forms_leave_nothing_but_content():
    served = ModelPlans("hermes", reasoning="qwen3")
    plan = served.plan(TOOLS, ToolChoice(), "<think>\n", structured_outputs={"regex": "[0-9]+"})
    assert plan.params == {}
    assert parse_reply(plan.parser(), "12").content == "12"


FORMS = [
    {"regex": "[0-9]+"}, {"choice": ["a", "b"]}, {"grammar": 'start: "a"'},
    {"structural_tag": {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}]}},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
@pytest.mark.parametrize("choice", [ToolChoice("required"), ToolChoice.function("now")], ids=["required", "named"])
def test_a_form_of_the_whole_output_leaves_no_room_for_calls_that_must_be(form, choice):
    (kind,) = form
    words = (
        rf"'tool_choice' must be \"auto\" or \"none\" with structured_outputs.{kind}, which is the form of the whole"
    )
    with pytest.raises(RequestError, match=words) as raised:
        ModelPlans("hermes").plan(TOOLS, choice, structured_outputs=form)
    assert raised.value.param == "tool_choice"


@pytest.mark.parametrize("form", [{"json": {"type": "object"}}, {"json_object": True}], ids=["json", "json_object"])
def test_calls_that_must_be_are_the_reply_where_the_content_has_a_form(form):
    served = ModelPlans("hermes")
    plan = served.plan(TOOLS, ToolChoice("required"), structured_outputs=form)
    assert served.allows(plan, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not served.allows(plan, '{"a": 1}')
    wrong = {"json": {"type": "array", "uniqueItems": True}}
    with pytest.raises(ToolkitError, match="structured_outputs must not have 'uniqueItems'"):
        served.plan(TOOLS, ToolChoice("required"), structured_outputs=wrong)


def test_markers_that_are_special_tokens_stay_in_the_text():
    served = ModelPlans("hermes", "<tool_call>", "</tool_call>", "<other>")
    kept = served.plan(TOOLS, ToolChoice()).params["kept_special_tokens"]
    assert served.tokenizer.convert_ids_to_tokens(kept) == ["<tool_call>", "</tool_call>"]
    assert served.plan((), None).params == {}


def test_what_cannot_be_enforced_is_refused():
    unknown = ModelPlans("none")
    with pytest.raises(
        RequestError, match=r"'tools' must be left out .* start the server with --tool-call-parser NAME"
    ):
        unknown.plan(TOOLS, ToolChoice())
    assert unknown.plan(TOOLS, ToolChoice("none")).params == {}
    pattern = Tool("f", "", {"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}})
    with pytest.raises(RequestError, match=r"tools must not have 'pattern' in a string's .* got it in 'tools.f.a'"):
        ModelPlans("qwen3_coder").plan([pattern], ToolChoice("required"))
    assert ModelPlans("hermes").plan([pattern], ToolChoice("required")).params["structured_outputs"]
    wrong = Tool("f", "", {"type": "object", "properties": {"a": {"uniqueItems": True, "type": "array"}}})
    with pytest.raises(RequestError, match="tools must not have 'uniqueItems' in a JSON schema"):
        ModelPlans("hermes").plan([wrong], ToolChoice("required"))


def test_a_missing_library_is_one_sentence(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match="tool_choice needs the package 'llguidance': pip install"):
        ModelPlans("hermes").plan(TOOLS, ToolChoice("required"))


BARE = {
    "llama3_json": '{{"name": "pick", "parameters": {{"size": {size}, "kind": "a"}}}}',
    "pythonic": '[pick(size={size}, kind="a")]',
}
LOOSE = {"llama3_json": '{"name": "now", "parameters": {"any": ["thing"]}}', "pythonic": "[now(any=1)]"}


@pytest.mark.parametrize("case", BARE)
def test_strict_tools_of_families_whose_calls_have_no_marker(case):
    served = ModelPlans(case)
    plan = served.plan([PICK, Tool("now")], ToolChoice())
    good, bad = BARE[case].format(size=1), BARE[case].format(size='"x"')
    for text, fine in (
        (good, True), (LOOSE[case], True), ("Hello {there} [you]", True), (" \n It is {", True),
        ("", True), (bad, False), (good[:-1], False), (f"{good} more", False),
    ):  # fmt: skip
        assert served.allows(plan, text) == fine, text
        calls = parse_reply(plan.parser(), text).calls if fine else []
        assert len(calls) == (text in (good, LOOSE[case]))
    alone = served.plan([Tool("now")], ToolChoice())
    assert "structured_outputs" not in alone.params


def test_strict_tools_without_a_marker_behind_reasoning():
    served = ModelPlans("llama3_json", reasoning="qwen3")
    plan = served.plan([PICK], ToolChoice(), "<think>\n")
    good = BARE["llama3_json"].format(size=1)
    for text, fine in (
        (f"hm</think>\n{good}", True), ("hm</think>Hello", True), (good, False),
        (f"hm</think>{BARE['llama3_json'].format(size=True)}", False),
    ):  # fmt: skip
        assert served.allows(plan, text) == fine, text
