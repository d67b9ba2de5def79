"""Errors name the field that the client sent, in every protocol, whoever finds what is wrong."""

import pytest

from tests.helpers.tiny_app import tiny_app
from tests.helpers.tool_template import TEMPLATE
from toolkit.engine import EngineUnavailable
from toolkit.errors import ToolkitError
from toolkit.serving.errors import RequestError
from toolkit.serving.field_names import named, of_form

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
OLLAMA, GENERATE, TOKENS = "/api/chat", "/api/generate", "/inference/v1/generate"
HELLO = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user", "content": "a page of state " * 100}]
BODIES = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": HELLO, "max_tokens": 4},
    OLLAMA: {"model": "tiny", "messages": HELLO, "stream": False},
    GENERATE: {"model": "tiny", "prompt": "hi", "stream": False},
    TOKENS: {"token_ids": [5, 6], "sampling_params": {}},
}


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


MANY = {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(499)}}
FORBIDDEN = {"type": "array", "uniqueItems": True}


@pytest.fixture(scope="module")
def web():
    with tiny_app(TEMPLATE) as client:
        yield client


def forms(schema):
    """(path, fields, the field with the schema) of every protocol that takes one."""
    named_schema = {"type": "json_schema", "name": "x", "schema": schema}
    return [
        (CHAT, {"structured_outputs": {"json": schema}}, "structured_outputs"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            "response_format.json_schema.schema",
        ),
        (RESPONSES, {"text": {"format": named_schema}}, "text.format.schema"),
        (
            MESSAGES,
            {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
            "output_config.format.schema",
        ),
        (MESSAGES, {"output_format": {"type": "json_schema", "schema": schema}}, "output_format.schema"),
        (OLLAMA, {"format": schema}, "format"),
        (GENERATE, {"format": schema}, "format"),
        (
            TOKENS,
            {"sampling_params": {"structured_outputs": {"json": schema}}},
            "sampling_params.structured_outputs",
        ),
    ]


WRONG = [
    (CHAT, {"max_tokens": 300}, "max_tokens", "must be <= 2"),
    (CHAT, {"max_completion_tokens": 300}, "max_completion_tokens", "must be <= 2"),
    (CHAT, {"max_completion_tokens": 2, "min_tokens": 3}, "min_tokens", "must be <= max_completion_tokens (2), got 3"),
    (CHAT, {"messages": LONG}, "messages", "must have <= 255 tokens"),
    (COMPLETIONS, {"prompt": "a page of state " * 100}, "prompt", "must have <= 255 tokens"),
    (COMPLETIONS, {"max_tokens": 300}, "max_tokens", "must be <= 2"),
    (RESPONSES, {"max_output_tokens": 300}, "max_output_tokens", "must be <= 2"),
    (RESPONSES, {"input": LONG}, "input", "must have <= 255 tokens"),
    (RESPONSES, {"input": [{"role": "user", "content": "a" * 9000}]}, "input", "must have <= 2560 characters"),
    (MESSAGES, {"messages": LONG}, "messages", "must have <= 255 tokens"),
    (MESSAGES, {"stop_sequences": [""]}, "stop_sequences", "must be a string that is not empty"),
    (OLLAMA, {"options": {"top_p": 3}}, "options.top_p", "must be a finite number > 0 and <= 1, got 3"),
    (OLLAMA, {"options": {"repeat_penalty": 0}}, "options.repeat_penalty", "must be a finite number >= 1e-05"),
    (OLLAMA, {"messages": LONG}, "messages", "must have <= 255 tokens"),
    (GENERATE, {"prompt": LONG[0]["content"]}, "prompt", "must have <= 255 tokens"),
    (GENERATE, {"options": {"stop": [""]}}, "options.stop", "must be a string that is not empty"),
    (TOKENS, {"token_ids": [5] * 300}, "token_ids", "must have <= 255 tokens"),
    (TOKENS, {"sampling_params": {"max_tokens": 300}}, "sampling_params.max_tokens", "<= 254 after a prompt of 2"),
    (TOKENS, {"sampling_params": {"bad_words": [""]}}, "sampling_params.bad_words", "must be a list of strings"),
    (TOKENS, {"sampling_params": {"priority": 2**63}}, "sampling_params.priority", "must be an integer"),
    (TOKENS, {"sampling_params": {}, "priority": 2**63}, "priority", "must be an integer"),
]  # fmt: skip


def error_of(response, path):
    """(status, sentence, field or None where the protocol's errors have none)."""
    error = response.json()["error"]
    if path in (OLLAMA, GENERATE):
        return response.status_code, error, None
    return response.status_code, error["message"], error.get("param")


def check(web, path, fields, param, words):
    status, message, found = error_of(web.post(path, json={**BODIES[path], **fields}), path)
    assert status == 400, message
    assert words in message
    field = message.split(" ")[0].strip("'")
    assert field == param or field.startswith(f"{param}."), message
    if found is not None:
        assert found == param or found.startswith(f"{param}.")


@pytest.mark.parametrize(("path", "fields", "param", "words"), WRONG)
def test_errors_are_about_the_fields_of_the_request(web, path, fields, param, words):
    check(web, path, fields, param, words)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (nested(200), "must be what can be enforced, got one that is not (it is nested too deep)."),
        (MANY, "must not have > 498 'properties' of an object that 'required' does not list in a JSON schema"),
        (FORBIDDEN, "must not have 'uniqueItems' in a JSON schema"),
    ],
    ids=["deep", "wide", "keyword"],
)
def test_a_schema_that_is_not_to_be_enforced_is_a_400_in_every_protocol(web, schema, words):
    for path, fields, param in forms(schema):
        check(web, path, fields, param, words)


def test_what_shows_while_tokens_come_is_a_400_without_a_class(web):
    """Alternatives side by side are too many for llguidance's row only once the output has begun."""
    schema = {"anyOf": [{"type": "object", "properties": {f"p{at}": {"type": "string"}}} for at in range(300)]}
    again = {"max_tokens": 40, "seed": 1}
    sampled = {TOKENS: {"sampling_params": again}, MESSAGES: {"max_tokens": 40, "temperature": 0}}
    sampled[RESPONSES] = {"max_output_tokens": 40, "temperature": 0}
    for path, fields, param in forms(schema):
        more = sampled.get(path, {"options": {"num_predict": 40, "seed": 1}} if path.startswith("/api") else again)
        if path == TOKENS:
            fields = {"sampling_params": {**fields["sampling_params"], **again}}
            more = {}
        check(web, path, {**fields, **more}, param, "cannot be followed further (it has too much that may come next in")
    fields = {**BODIES[CHAT], **again, "structured_outputs": {"json": schema}, "stream": True}
    events = web.post(CHAT, json=fields).text
    assert '"message":"structured_outputs cannot be followed further (it has too much' in events
    assert '"param":"structured_outputs"' in events
    assert "Error:" not in events


def test_parameters_that_leave_no_token_are_the_client_s(web):
    form, sampled = {"structured_outputs": {"choice": ["a"]}}, {"temperature": 1, "seed": 1}
    check(
        web, COMPLETIONS, {**form, **sampled, "bad_words": ["a"]}, "structured_outputs", "and bad_words leave no token"
    )
    asked = {"sampling_params": {**form, **sampled, "bad_words": ["a"]}}
    check(
        web, TOKENS, asked, "sampling_params.structured_outputs", "sampling_params.bad_words leave no token to sample"
    )


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_that_are_nested_too_deep_are_about_tools(web, choice):
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": nested(300)}}}
    tools = [{"type": "function", "function": function}]
    check_tools = {"model": "tiny", "messages": HELLO, "tools": tools, "tool_choice": choice}
    error = web.post(CHAT, json=check_tools).json()["error"]
    assert error["message"] == "The model's chat template rejects these tools (they are nested too deep)."
    assert error["param"] == "tools"


def test_a_field_is_renamed_with_what_stands_behind_it_and_nothing_else():
    names = {**of_form("text.format"), "max_tokens": "max_output_tokens", "prompt": "input", "stop": "stops"}
    error = named(ToolkitError("max_tokens must be <= 4 after a prompt of 6 tokens, got 9."), names)
    assert (str(error), error.param) == (
        "'max_output_tokens' must be <= 4 after a prompt of 6 tokens, got 9.", "max_output_tokens"
    )  # fmt: skip
    error = named(ToolkitError("min_tokens must be <= max_tokens (3), got 'max_tokens'."), names)
    assert str(error) == "min_tokens must be <= max_output_tokens (3), got 'max_tokens'."
    assert not isinstance(error, RequestError)
    error = named(ToolkitError("structured_outputs.structural_tag.triggers[0] must be a, got b."), names)
    assert error.param == "text.format.triggers[0]"
    error = named(RequestError("'prompt' must be x.", "prompt", status=404, code="c"), names)
    assert (str(error), error.param, error.status, error.code) == ("'input' must be x.", "input", 404, "c")
    assert str(named(ToolkitError("stopping must be x."), names)) == "stopping must be x."
    busy = EngineUnavailable("max_tokens is busy")
    assert named(busy, names) is busy
