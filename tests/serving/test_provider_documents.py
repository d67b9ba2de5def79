"""Responses of OpenAI's routes are what OpenAI's own document says, and the check of that can fail."""

import json

import httpx
import pytest
from transformers import AutoTokenizer

from tests.helpers.provider_specs import check
from tests.helpers.saying_engine import saying
from tests.helpers.server_process import serving
from tests.helpers.tool_template import REASONED_CALL, TEMPLATE, WEATHER

HELLO = [{"role": "user", "content": "jumps over"}]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CHAT, CHUNK = "CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"


def bodies_of(response):
    """Of each event of a stream; the last one only ends it."""
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def http(talking_model):
    with serving(talking_model, "--port", "0") as one, httpx.Client(base_url=one.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2, "stop": "e"}])
def test_chats(http, fields):
    body = {"messages": HELLO, "max_tokens": 6, **fields}
    check("openai", CHAT, http.post("/v1/chat/completions", json=body).json())
    for chunk in bodies_of(http.post("/v1/chat/completions", json={**body, **USAGE})):
        check("openai", CHUNK, chunk)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"n": 2, "echo": True}])
def test_completions(http, fields):
    body = {"prompt": "the quick", "max_tokens": 6, **fields}
    check("openai", "CreateCompletionResponse", http.post("/v1/completions", json=body).json())


def test_models_and_errors(http):
    check("openai", "ListModelsResponse", http.get("/v1/models").json())
    check("openai", "Model", http.get("/v1/models/tiny").json())
    for refused in (http.get("/v1/models/large"), http.post("/v1/completions", json={}), http.get("/v1/nothing")):
        assert refused.status_code in (400, 404)
        check("openai", "ErrorResponse", refused.json())


def test_tool_calls_and_reasoning_in_chats(chat_model):
    http, _ = saying(REASONED_CALL, TEMPLATE, AutoTokenizer.from_pretrained(chat_model))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
    body = {"messages": HELLO, "tools": tools}
    with http:
        whole = http.post("/v1/chat/completions", json=body).json()
        chunks = bodies_of(http.post("/v1/chat/completions", json={**body, **USAGE}))
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    check("openai", CHAT, whole)
    for chunk in chunks:
        check("openai", CHUNK, chunk)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (CHAT, {"id": "a", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0}]}),
        (CHUNK, {"id": "a", "object": "chat.completion.chunk", "created": "now", "model": "m", "choices": []}),
        ("ResponseStreamEvent", {"type": "response.output_text.delta", "delta": "a", "sequence_number": 0}),
    ],
)
def test_what_the_document_does_not_describe_is_found(name, value):
    with pytest.raises(AssertionError):
        check("openai", name, value)
