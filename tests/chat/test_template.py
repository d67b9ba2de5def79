"""A template gets the form that it reads: no text vanishes, and what a line or a request holds reaches it."""

from typing import Any

import pytest

from tests.helpers.tokenizers import CHATML, make_tokenizer
from toolkit.chat import ChatTemplateError, render, render_spans

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
PARTS = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}[{{ m.role }}]{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
CALLS = (
    "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.arguments ARGUMENTS }}{% endfor %}"
    "{% endfor %}"
)


def chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_stock_rendering_where_the_form_is_the_usual_one() -> None:
    tokenizer = make_tokenizer(chat_template="{{ tools }}{{ mood }}" + CHATML)
    messages = [*chat(("system", "s"), ("user", "u")), {"role": "assistant", "content": None}]
    for last in (True, False):
        stock = tokenizer.apply_chat_template(
            messages, tools=[TOOL], tokenize=False, add_generation_prompt=last, mood="sad"
        )
        ours = render(tokenizer, messages, [TOOL], add_generation_prompt=last, chat_template_kwargs={"mood": "sad"})
        assert ours == stock
        assert "get_weather" in ours
    open_end = render(tokenizer, chat(("user", "u"), ("assistant", "be")), continue_final_message=True)
    assert open_end.endswith("assistant\nbe")


def test_text_parts_and_strings_are_read_by_any_template() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    string, parts = (
        chat(("user", "héllo")),
        chat(("user", [{"type": "text", "text": "hé"}, {"type": "text", "text": "llo"}])),
    )
    assert render(tokenizer, string) == render(tokenizer, parts) == "<|im_start|>user\nhéllo<|im_end|>\n"
    assert (
        render(tokenizer, string, chat_template=PARTS) == render(tokenizer, parts, chat_template=PARTS) == "[user]héllo"
    )
    picture = chat(("user", [{"type": "image"}, {"type": "text", "text": "x"}]))
    assert render(tokenizer, picture, chat_template="{{ messages[0].content | length }}") == "2"
    with pytest.raises(ChatTemplateError, match="it takes text only, and a message has parts of type image, text"):
        render(tokenizer, picture)


def test_a_developer_is_the_system_where_only_that_is_known() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    messages = chat(("developer", "be brief"), ("user", "u"))
    assert "developer\nbe brief" in render(tokenizer, messages)
    assert render(tokenizer, messages, chat_template=PARTS) == "[system]be brief[user]u"
    neither = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert render(tokenizer, messages, chat_template=neither) == "u"
    assert messages[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("use", "expected"), [("| tojson", '{"city": "é"}'), ("['city']", "é"), ("+ '!'", '{"city": "é"}!')]
)
@pytest.mark.parametrize("arguments", ['{"city": "é"}', {"city": "é"}])
def test_arguments_of_tool_calls(use: str, expected: str, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert render(make_tokenizer(), messages, chat_template=CALLS.replace("ARGUMENTS", use)) == expected
    assert call["function"]["arguments"] == arguments  # type: ignore[index]


def test_tools_as_json_text_and_no_tools() -> None:
    template = "{% if tools is not none %}{{ tools[0].function.name }}{% endif %}"
    tokenizer = make_tokenizer(chat_template=template)
    messages = chat(("user", "u"))
    assert render(tokenizer, messages, '[{"function": {"name": "f"}}]') == "f"
    assert render(tokenizer, messages, []) == render(tokenizer, messages, None) == ""


def test_generation_markers_as_characters() -> None:
    tokenizer = make_tokenizer()
    marked = "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    template = CHATML.replace("{{ m['content'] }}<|im_end|>\n", marked)
    messages = chat(("user", "é"), ("assistant", "bc"))
    text, spans = render_spans(tokenizer, messages, chat_template=template)
    assert text == render(tokenizer, messages, chat_template=CHATML)
    assert spans is not None
    assert [text[begin:end] for begin, end in spans] == ["é<|im_end|>", "bc<|im_end|>"]
    assert render_spans(tokenizer, messages, chat_template=CHATML) == (text, None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chat_template": "{{ raise_exception('roles must alternate') }}"}, "roles must alternate"),
        ({"chat_template": "{% if %}"}, "Expected an expression"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize' is not a variable of a template"),
        ({"tools": "{"}, "'tools' is a string that is not JSON"),
        ({"tools": [3]}, "'tools' is not a list of mappings"),
        ({"chat_template": None}, "the tokenizer has none"),
    ],
)
def test_what_a_template_does_not_take(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        render(make_tokenizer(), chat(("user", "u")), **{"chat_template": CHATML, **options})
    assert caught.value.reason.startswith(reason)
    assert "\n" not in str(caught.value)


def test_calls_without_content_for_templates_that_ask_for_none_and_for_text() -> None:
    wants_none = (
        "{% for m in messages %}{% if m['content'] is none %}{% for c in m.tool_calls %}CALL {{ c.function.name }}"
        "{{ ' ' + c.function.arguments }}{% endfor %}{% else %}{{ m.role + ': ' + m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    wants_text = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% for c in m.tool_calls or [] %}"
        "CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    wants_either = wants_text.replace("m.role + ': ' + m.content", "m.role ~ ': ' ~ m['content']")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "None"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for template, expected in (
        (wants_none, 'user: NoneCALL f {"a": 1}'),
        (wants_text, 'user: Noneassistant: CALL f {"a": 1}'),
        (wants_either, 'user: Noneassistant: CALL f {"a": 1}'),
    ):
        assert render(make_tokenizer(chat_template=template), messages) == expected
    assert messages[1]["content"] is None
