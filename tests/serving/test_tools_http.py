"""Tools and reasoning over ``/v1/chat/completions``, through the ``openai`` client, of an engine that says a text."""

import json
import random

import openai
import pytest
from pydantic import BaseModel

from tests.helpers.replies import ARGUMENTS, CALLS, TOOLS
from tests.helpers.saying_engine import saying
from tests.helpers.tokenizers import make_tokenizer
from tests.helpers.tool_templates import CODER, HERMES, LLAMA
from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.serving.openai import schemas

SPECS = [tool.for_template() for tool in TOOLS]
HELLO = [{"role": "user", "content": "hi"}]
TEMPLATES = {"hermes": HERMES, "qwen3_coder": CODER, "llama3_json": LLAMA}
TOKENIZER = make_tokenizer()


def cut(text: str, seed: int = 0) -> list[str]:
    """The text in parts of random lengths."""
    rng, parts, at = random.Random(seed), [], 0
    while at < len(text):
        size = rng.choice((1, 2, 3, 8))
        parts.append(text[at : at + size])
        at += size
    return parts


class Conversation:
    """A client of a model that says a text, and what its engine was given."""

    def __init__(self, text: str, template: str = HERMES, **options):
        self.web, self.engine = saying(cut(text), template, TOKENIZER, **options)
        self.engine.grammars = GrammarCompiler(TOKENIZER, len(TOKENIZER), frozenset({2}))
        self.client = openai.OpenAI(base_url="http://testserver/v1", api_key="any", max_retries=0, http_client=self.web)

    def __enter__(self):
        self.web.__enter__()
        submit = self.engine.submit_batch
        self.engine.submit_batch = lambda prompts, params: self.note(prompts) or submit(prompts, params)
        return self

    def __exit__(self, *about):
        self.web.__exit__(*about)

    def note(self, prompts) -> None:
        self.prompt = TOKENIZER.decode(prompts[0])

    def ask(self, messages=HELLO, **fields):
        return self.client.chat.completions.create(model="told", messages=messages, **fields)

    def raw(self, **fields) -> dict:
        return self.web.post("/v1/chat/completions", json={"messages": HELLO, **fields}).json()


def streamed(chunks) -> tuple[str, str, list[dict], str]:
    """(content, reasoning, calls, finish reason) of a stream, which is checked."""
    content = reasoning = reason = ""
    calls: list[dict] = []
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        assert getattr(choice.delta, "reasoning", None) == getattr(choice.delta, "reasoning_content", None)
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(calls)
                assert call.type == "function"
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            assert call.index == len(calls) - 1
            calls[-1]["arguments"] += call.function.arguments
        reason = choice.finish_reason or reason
    return content, reasoning, calls, reason


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_apart_from_content(family, stream):
    with Conversation(CALLS[family], TEMPLATES[family]) as one:
        found = one.ask(tools=SPECS, stream=stream)
        if stream:
            content, _, calls, reason = streamed(found)
            assert content == ""
        else:
            choice, reason = found.choices[0], found.choices[0].finish_reason
            assert choice.message.content is None
            calls = [{"id": call.id, **call.function.model_dump()} for call in choice.message.tool_calls]
        assert reason == "tool_calls"
        assert [call["name"] for call in calls] == ["get_weather", "now"]
        assert [json.loads(call["arguments"]) for call in calls] == [ARGUMENTS, {}]
        assert len({call["id"] for call in calls}) == 2
        assert all(tool.name in one.prompt for tool in TOOLS)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_content_and_calls(stream):
    text = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALLS['hermes']}"
    with Conversation(text) as one:
        for fields, reasoning in (({}, "Hm."), ({"extra_body": {"include_reasoning": False}}, "")):
            found = one.ask(tools=SPECS, stream=stream, **fields)
            if stream:
                content, thought, calls, reason = streamed(found)
            else:
                message, reason = found.choices[0].message, found.choices[0].finish_reason
                content, calls = message.content, message.tool_calls
                thought = getattr(message, "reasoning_content", "")
                assert getattr(message, "reasoning", "") == thought
            assert (content, thought, len(calls), reason) == ("Let me see.", reasoning, 2, "tool_calls")


def test_calls_without_tools_or_with_none_are_content():
    for fields in ({}, {"tools": SPECS, "tool_choice": "none"}):
        with Conversation(CALLS["hermes"]) as one:
            choice = one.ask(**fields).choices[0]
            assert choice.message.content == CALLS["hermes"]
            assert choice.message.tool_calls is None
            assert choice.finish_reason == "stop"


def test_one_call_where_parallel_calls_are_off():
    with Conversation(CALLS["hermes"]) as one:
        (call,) = one.ask(tools=SPECS, parallel_tool_calls=False).choices[0].message.tool_calls
        assert call.function.name == "get_weather"


def test_a_call_that_is_cut_off_keeps_its_finish_reason():
    text = CALLS["hermes"][:60]
    with Conversation(text, finish_reason="length") as one:
        choice = one.ask(tools=SPECS).choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments == '{"city": "S'
        _, _, (call,), reason = streamed(one.ask(tools=SPECS, stream=True))
        assert (call["arguments"], reason) == ('{"city": "S', "length")


def test_log_probabilities_and_token_ids_stay_whole():
    text = f"<think>\nHm.\n</think>\n\nOk.\n{CALLS['hermes']}"
    with Conversation(text) as one:
        count = len(one.engine.chunks)
        whole = one.ask(tools=SPECS, logprobs=True)
        assert len(whole.choices[0].logprobs.content) == count
        chunks = list(one.ask(tools=SPECS, logprobs=True, stream=True, extra_body={"return_token_ids": True}))
        shown = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs is not None]
        assert sum(len(one.content) for one in shown) == count
        ids = [choice.token_ids for chunk in chunks for choice in chunk.choices if getattr(choice, "token_ids", None)]
        assert sum(map(len, ids)) == count


CALLED = {"name": "get_weather", "arguments": '{"city": "Rom\\u00e9"}'}
HISTORY = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
        "reasoning_content": "I look it up.", "provider_specific_fields": {"refusal": None},
        "tool_calls": [{"id": "call_1", "type": "function", "function": CALLED}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
]  # fmt: skip


def test_a_history_with_calls_reaches_the_template():
    with Conversation("Fine.") as one:
        assert one.ask(HISTORY, tools=SPECS).choices[0].message.content == "Fine."
        assert "<think>\nI look it up.\n</think>\n\n<tool_call>" in one.prompt
        assert '"arguments": {"city": "Romé"}' in one.prompt.replace("\\u00e9", "é")
        assert "tool get_weather\nsunny" in one.prompt
        old = [
            HISTORY[0],
            {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": ""}},
            {"role": "function", "name": "now", "content": "12:00"},
        ]
        one.ask(old)
        assert '{"name": "now", "arguments": {}}' in one.prompt
        assert "tool now\n12:00" in one.prompt


def test_a_call_that_was_cut_off_can_be_sent_back():
    cut_off = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "now", "arguments": '{"a": '}}]}
    with Conversation("x") as one:
        one.ask([*HELLO, cut_off])
        assert '{"name": "now", "arguments": "{\\"a\\": "}' in one.prompt


def test_a_reply_can_be_sent_back():
    with Conversation(f"<think>\nHm.\n</think>\n\n{CALLS['hermes']}") as one:
        message = one.ask(tools=SPECS).choices[0].message
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": str(at)} for at, call in enumerate(message.tool_calls)
        ]
        one.ask([*HELLO, message, *results], tools=SPECS)
        assert CALLS["hermes"].split("\n")[1] in one.prompt
        assert "tool get_weather\n0" in one.prompt
        assert "tool now\n1" in one.prompt


def test_variables_of_the_template():
    with Conversation("x") as one:
        one.ask(reasoning_effort="low", extra_body={"documents": [{"title": "A", "text": "a"}]})
        assert one.prompt.startswith("effort low\ndocument A\n")
        assert one.prompt.endswith("<|im_start|>assistant\n")
        for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
            one.ask(extra_body=fields)
            assert one.prompt.endswith("assistant\n<think>\n\n</think>\n\n")
        one.ask(extra_body={"add_generation_prompt": False})
        assert one.prompt.endswith("hi<|im_end|>\n")


@pytest.mark.parametrize("begun", ["<think>\nWell, ", "Well, "])
def test_the_last_message_is_continued(begun):
    messages = [*HELLO, {"role": "assistant", "content": begun}]
    with Conversation("yes.</think>Done.") as one:
        message = one.ask(messages, extra_body={"continue_final_message": True}).choices[0].message
        assert one.prompt.endswith(begun.rstrip()) or one.prompt.endswith(begun)
        if "think" in begun:
            assert (message.reasoning_content, message.content) == ("yes.", "Done.")
        else:
            assert message.content == "yes.</think>Done."


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    days: int


@pytest.mark.parametrize("stream", [False, True])
def test_pydantic_tools_are_parsed(stream):
    tool = openai.pydantic_function_tool(Weather)
    text = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
    with Conversation(text) as one:
        asked = {"model": "told", "messages": HELLO, "tools": [tool]}
        if stream:
            with one.client.chat.completions.stream(**asked) as events:
                found = events.get_final_completion()
        else:
            found = one.client.chat.completions.parse(**asked)
        (call,) = found.choices[0].message.tool_calls
        assert call.function.parsed_arguments == Weather(city="Rome", days=2)
        assert "<tool_call>" in one.engine.submitted[0].form.grammar  # the tool is strict


WRONG = [
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "function"),
    ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name", "must be 1 to 128"),
    ({"tools": SPECS * 2}, "tools", "must have a function once, got 'get_weather' twice"),
    ({"tools": SPECS, "tool_choice": "any"}, "tool_choice", "must be 'none', 'auto', 'required' or an object"),
    ({"tool_choice": "required"}, "tool_choice", "'tools' has none"),
    ({"tools": SPECS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "got 'x'"),
    ({"tools": SPECS, "tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages' is not a variable"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "is a program that the server would run"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt", "give one"),
    ({"reasoning_effort": "much"}, "reasoning_effort", "must be one of 'none'"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "is required"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages[0]", "of the role 'assistant'"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), WRONG, ids=lambda value: None)
def test_wrong_requests_are_one_sentence(fields, param, words):
    with Conversation("x") as one:
        error = one.raw(**fields)["error"]
        assert words in error["message"], error
        assert error["param"] == param
        assert error["message"].count(". ") == 0


def test_templates_that_show_no_tools_are_an_error():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    with Conversation("x", plain, tool_call_parser="hermes") as one:
        message = one.raw(tools=SPECS)["error"]["message"]
        assert message == "The model's chat template shows nothing of the tool 'get_weather' in 'tools'."
        assert "choices" in one.raw(tools=SPECS, tool_choice="none")
    with Conversation("x", HERMES, tool_call_parser="none") as one:
        assert "start the server with --tool-call-parser NAME" in one.raw(tools=SPECS)["error"]["message"]


def test_responses_are_what_the_document_says():
    with Conversation(f"<think>Hm.</think>Ok{CALLS['hermes']}") as one:
        schemas.ChatCompletionObject.model_validate(one.raw(tools=SPECS))
        document = one.web.get("/openapi.json").json()["components"]["schemas"]
        assert {"tools", "tool_choice", "chat_template_kwargs"} <= set(document["ChatRequest"]["properties"])
        assert "tool_calls" in document["AssistantMessage"]["properties"]
