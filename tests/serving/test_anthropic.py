"""``/v1/messages`` of a real server process, asked through the ``anthropic`` client."""

import asyncio
import json
from types import SimpleNamespace

import anthropic
import httpx
import pytest
from transformers import AutoTokenizer

from tests.helpers.provider_specs import check
from tests.helpers.server_process import serving

HELLO = [{"role": "user", "content": "jumps over"}]
KEY = "a key"
BODY = {"model": "tiny", "max_tokens": 8, "temperature": 0}
GREEDY = {"model": "tiny", "max_tokens": 8, "extra_body": {"temperature": 0}}
"""The client has no argument for the temperature, which the API has."""


@pytest.fixture(scope="module")
def server(talking_model):
    options = ("--port", "0", "--grace", "3", "--api-key", KEY, "--max-num-seqs", "16")
    with serving(talking_model, *options) as one:
        client = anthropic.Anthropic(base_url=one.url, api_key=KEY, max_retries=0, timeout=60)
        headers = {"x-api-key": KEY}
        with httpx.Client(base_url=one.url, timeout=60, headers=headers) as http:
            yield SimpleNamespace(url=one.url, client=client, http=http)


@pytest.fixture
def client(server):
    return server.client


@pytest.fixture(scope="module")
def tokenizer(talking_model):
    return AutoTokenizer.from_pretrained(talking_model)


def chat_text(server, messages, **fields):
    """What OpenAI's route says to the same messages."""
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    response = server.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"})
    return response.json()["choices"][0]["message"]["content"]


def test_a_message_says_what_the_other_protocol_says(client, server, tokenizer):
    message = client.messages.create(messages=HELLO, system="the lazy dog", **GREEDY)
    chat = [{"role": "system", "content": "the lazy dog"}, *HELLO]
    assert message.content[0].text == chat_text(server, chat)
    assert [block.type for block in message.content] == ["text"]
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(tokenizer(prompt)["input_ids"])
    assert message.usage.output_tokens == 8
    assert message._request_id
    # Blocks are the same as text.
    blocks = [
        {"type": "text", "text": "the lazy", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": " dog"},
    ]
    again = client.messages.create(
        messages=[{"role": "user", "content": [{"type": "text", "text": "jumps over"}]}], system=blocks, **GREEDY
    )
    assert again.content[0].text == message.content[0].text


def test_a_stream_adds_up_to_the_message(client, server):
    message = client.messages.create(messages=HELLO, **GREEDY)
    with client.messages.stream(messages=HELLO, **GREEDY) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == final.content[0].text == message.content[0].text
    assert final.usage.output_tokens == message.usage.output_tokens == 8
    assert final.stop_reason == "max_tokens"
    assert input_tokens(final) == input_tokens(message)


def input_tokens(message):
    return message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_tokens_from_the_prefix_cache_are_counted_apart(client):
    messages = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 20}]
    first, second = (client.messages.create(messages=messages, **GREEDY) for _ in range(2))
    assert first.usage.cache_read_input_tokens == 0
    assert second.usage.cache_read_input_tokens > 0
    assert input_tokens(first) == input_tokens(second)
    with client.messages.stream(messages=messages, **GREEDY) as stream:
        assert stream.get_final_message().usage.cache_read_input_tokens == second.usage.cache_read_input_tokens


def lines_of(response):
    """(name, data) of each event, and of each the body."""
    events = [part.split("\n") for part in response.text.split("\n\n") if part]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]


def test_responses_and_events_are_those_of_the_providers_document(server):
    body = {**BODY, "messages": HELLO}
    check("anthropic", "Message", server.http.post("/v1/messages", json=body).json())
    events = lines_of(server.http.post("/v1/messages", json={**body, "stream": True}))
    for name, event in events:
        assert name == event["type"]
        if name != "ping":  # which the document leaves out
            check("anthropic", "MessageStreamEvent", event)
    kinds = [name for name, _ in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    counted = server.http.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": HELLO})
    check("anthropic", "CountMessageTokensResponse", counted.json())


def test_a_stop_sequence_is_named(client):
    text = client.messages.create(messages=HELLO, **GREEDY).content[0].text
    stop = text[3:5]
    message = client.messages.create(messages=HELLO, stop_sequences=["never there", stop], **GREEDY)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]


def test_the_reply_continues_a_last_message_of_the_assistant(client, server):
    whole = client.messages.create(messages=HELLO, **GREEDY).content[0].text
    begun = whole[:4]
    rest = client.messages.create(messages=[*HELLO, {"role": "assistant", "content": begun}], **GREEDY)
    assert rest.content[0].text
    prompt = f"user: jumps over\nassistant: {begun}"
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    plain = server.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}).json()
    assert rest.content[0].text == plain["choices"][0]["text"]


def test_neighbours_of_one_role_are_one_message(client):
    parts = [{"role": "user", "content": "jumps"}, {"role": "user", "content": "over"}]
    joined = [{"role": "user", "content": "jumps\nover"}]
    texts = [client.messages.create(messages=one, **GREEDY).content[0].text for one in (parts, joined)]
    assert texts[0] == texts[1]


def test_tokens_are_counted(client):
    counted = client.messages.count_tokens(model="tiny", messages=HELLO, system="the lazy dog")
    message = client.messages.create(messages=HELLO, system="the lazy dog", **GREEDY)
    assert counted.input_tokens == input_tokens(message)


def test_a_schema_is_kept(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(messages=HELLO, output_config=config, **{**GREEDY, "max_tokens": 40})
    assert json.loads(message.content[0].text)["a"] in (1, 2)


def test_the_asynchronous_client_and_an_authorization_header(server):
    async def ask():
        async with anthropic.AsyncAnthropic(base_url=server.url, auth_token=KEY, max_retries=0) as client:
            return await client.messages.create(messages=HELLO, **GREEDY)

    assert asyncio.run(ask()).usage.output_tokens == 8


def test_what_changes_no_token_is_accepted(client):
    plain = client.messages.create(messages=HELLO, **GREEDY).content[0].text
    same = client.messages.create(
        messages=HELLO,
        metadata={"user_id": "u"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        tools=[],
        extra_headers={"anthropic-beta": "some-beta-2025-01-01"},
        **{**GREEDY, "extra_body": {"temperature": 0, "top_k": 0, "service_tier": "auto"}},
    )
    assert same.content[0].text == plain


def error_of(raised):
    body = raised.value.body
    check("anthropic", "ErrorResponse", body)
    assert body["request_id"] == raised.value.request_id
    return body["error"]


def test_errors_have_the_form_of_the_protocol(client, server):
    with pytest.raises(anthropic.NotFoundError) as raised:
        client.messages.create(messages=HELLO, **{**GREEDY, "model": "large"})
    assert error_of(raised) == {"type": "not_found_error", "message": "'model' must be 'tiny', got 'large'."}
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(messages=HELLO, **{**GREEDY, "extra_body": {"temperature": -1}})
    assert error_of(raised)["message"] == "temperature must be a finite number >= 0, got -1.0."
    with pytest.raises(anthropic.AuthenticationError) as raised:
        client.with_options(api_key="another").messages.create(messages=HELLO, **GREEDY)
    assert error_of(raised)["type"] == "authentication_error"
    with pytest.raises(anthropic.APIStatusError) as raised:
        client.messages.create(messages=[{"role": "user", "content": "x" * 5_000_000}], **GREEDY)
    assert raised.value.status_code == 413
    assert raised.value.body["error"]["type"] == "request_too_large"
    for path, status, kind in (
        ("/v1/messages/batches", 404, "not_found_error"),
        ("/v1/messages", 405, "invalid_request_error"),
    ):
        response = server.http.get(path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == kind
        assert response.json()["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert "type" in server.http.get("/v1/nowhere").json()["error"]
    assert "request_id" not in server.http.get("/v1/nowhere").json()


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
WRONG = [
    ({"max_tokens": None}, "'max_tokens' is required."),
    ({"messages": []}, "'messages' must be a list of at least 1, got []."),
    ({"messages": [{"role": "tool", "content": "a"}]}, "'messages[0].role' must be one of 'user', 'assistant'"),
    ({"messages": [{"role": "user", "content": 3}]}, "'content' must be text or a list of blocks, got 3."),
    (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "'messages[0].content[0].type' must be one of 'text', 'image', 'tool_use', 'tool_result', 'thinking', "
        "'redacted_thinking', got 'video'.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]},
        "'content' of a message of the role 'user' must have blocks of the types 'text', 'image', 'tool_result', got "
        "'thinking'.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txt": 1}]}]},
        "Unknown field 'messages[0].content[0].txt'; did you mean 'text'?",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        "'messages[0]' has the result of a tool call 'x' that no message makes.",
    ),
    ({"stop_sequences": [""]}, "stop"),
    ({"stop": ["a"]}, "Unknown field 'stop'"),
    ({"mcp_servers": [{"url": "x"}]}, "this server does not offer 'mcp_servers'"),
    ({"container": "x"}, "this server does not offer 'container'"),
    ({"thinking": {"type": "enabled", "budget_tokens": 3}}, "'thinking.budget_tokens' must be >= 1024, got 3."),
    ({"tool_choice": {"type": "any"}}, "'tool_choice' has the type 'any', but there are no 'tools'."),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'tools[0].type' must be "),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "The served model takes no images"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=lambda value: None)
def test_a_wrong_request_is_one_sentence(server, fields, words):
    body = {**BODY, "messages": HELLO, **fields}
    response = server.http.post("/v1/messages", json=body)
    assert response.status_code == 400
    check("anthropic", "ErrorResponse", response.json())
    message = response.json()["error"]["message"]
    assert words in message
    assert message.endswith((".", "?"))
