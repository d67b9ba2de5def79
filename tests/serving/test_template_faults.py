"""What a chat template rejects or does not exist for is an error about the field that it comes from."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from tests.helpers.tiny_app import tiny_app
from tests.helpers.tool_template import TEMPLATE, WEATHER

HELLO = [{"role": "user", "content": "hi"}]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
OLLAMA, GENERATE, TOKENIZE, APPLY = "/api/chat", "/api/generate", "/tokenize", "/apply-template"
COUNT = "/v1/messages/count_tokens"
BODIES = {
    CHAT: {"messages": HELLO},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": HELLO, "max_tokens": 4},
    COUNT: {"messages": HELLO},
    OLLAMA: {"model": "tiny", "messages": HELLO},
    GENERATE: {"model": "tiny", "prompt": "hi"},
    TOKENIZE: {"messages": HELLO},
    APPLY: {"messages": HELLO},
}
STRICT = (
    "{% if reasoning_effort == 'high' %}{{ raise_exception('it knows no effort') }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ raise_exception('it always thinks') }}{% endif %}"
    "{% for one in documents or [] %}<{{ one.text }}>{% endfor %}"
)
FUNCTION = {"name": "weather", "parameters": WEATHER}


@pytest.fixture(scope="module")
def web() -> Iterator[TestClient]:
    with tiny_app(STRICT + TEMPLATE) as client:
        yield client


@pytest.fixture(scope="module")
def bare() -> Iterator[TestClient]:
    with tiny_app(None) as client:
        yield client


def refused(web: TestClient, path: str, fields: object) -> tuple[str, str | None]:
    """The sentence, and the field where the protocol has a place for it."""
    response = web.post(path, json={**BODIES[path], **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return (error, None) if isinstance(error, str) else (error["message"], error.get("param"))


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        (CHAT, {"chat_template_kwargs": {"x": 1, "documents": "abc", "y": 2}}, "chat_template_kwargs.documents"),
        (TOKENIZE, {"chat_template_kwargs": {"documents": 5}}, "chat_template_kwargs.documents"),
        (APPLY, {"chat_template_kwargs": {"documents": ["a"]}}, "chat_template_kwargs.documents"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
        (CHAT, {"reasoning_effort": "none"}, "reasoning_effort"),
        (CHAT, {"chat_template_kwargs": {"reasoning_effort": "high"}}, "chat_template_kwargs.reasoning_effort"),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        (RESPONSES, {"reasoning": {"effort": "none"}}, "reasoning.effort"),
        (MESSAGES, {"output_config": {"effort": "max"}}, "output_config.effort"),
        (MESSAGES, {"thinking": {"type": "disabled"}}, "thinking"),
        (COUNT, {"thinking": {"type": "disabled"}}, "thinking"),
        (OLLAMA, {"think": "max"}, "think"),
        (GENERATE, {"think": False}, "think"),
    ],
)
def test_a_variable_that_the_template_rejects(web: TestClient, path: str, fields: object, field: str) -> None:
    message, param = refused(web, path, fields)
    assert message.startswith(f"'{field}' must be what the model's chat template takes (")
    assert param in (field, None)


def test_documents_that_the_template_does_not_show_are_named_where_they_stand(web: TestClient) -> None:
    page = [{"text": "a page"}, {"title": "nothing of this"}]
    for fields, field in (
        ({"documents": page}, "documents[1]"),
        ({"chat_template_kwargs": {"documents": page}}, "chat_template_kwargs.documents[1]"),
    ):
        for path in (CHAT, TOKENIZE, APPLY):
            said = f"'{field}' must be left out: the model's chat template shows nothing of it."
            assert refused(web, path, fields) == (said, field)


@pytest.mark.parametrize(
    ("path", "tool", "field"),
    [
        (CHAT, {"type": "function", "function": FUNCTION}, "messages"),
        (RESPONSES, {"type": "function", **FUNCTION}, "input"),
        (MESSAGES, {"name": "weather", "input_schema": WEATHER}, "messages"),
        (OLLAMA, {"type": "function", "function": FUNCTION}, "messages"),
        (GENERATE, None, "prompt"),
        (TOKENIZE, {"type": "function", "function": FUNCTION}, "messages"),
        (APPLY, {"type": "function", "function": FUNCTION}, "messages"),
    ],
)
def test_a_model_without_a_template(bare: TestClient, path: str, tool: object, field: str) -> None:
    for fields in ({}, {"tools": [tool]}) if tool else ({},):
        message, param = refused(bare, path, fields)
        assert message == (
            f"'{field}' needs a chat template, which the served model does not have; use /v1/completions with a "
            "'prompt', or start the server with --chat-template."
        )
        assert param in (field, None)
