"""Tools and thoughts in ``/v1/messages``, through the ``anthropic`` client."""

import anthropic
import httpx
import pytest
from transformers import AutoTokenizer

from tests.helpers.provider_specs import check
from tests.helpers.saying_engine import saying_clients
from tests.helpers.server_process import serving
from tests.helpers.tool_template import CALL, REASONED_CALL, TEMPLATE, WEATHER

HELLO = [{"role": "user", "content": "Oslo?"}]
TOOLS = [{"name": "weather", "description": "of a city", "input_schema": WEATHER}]
ASK = {"model": "told", "max_tokens": 64, "messages": HELLO}


@pytest.fixture(scope="module")
def tokenizer(chat_model):
    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture
def said(tokenizer):
    """Makes a client of a model that says chunks of text."""

    def connect(http):
        return anthropic.Anthropic(base_url="http://testserver", api_key="any", http_client=http, max_retries=0)

    with saying_clients(tokenizer, TEMPLATE, connect) as make:
        yield make


def test_thoughts_text_and_a_call_are_blocks(said):
    client, _ = said(REASONED_CALL)
    message = client.messages.create(**ASK, tools=TOOLS)
    check("anthropic", "Message", message.model_dump(mode="json", warnings=False) | {"container": None})
    thinking, text, call = message.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "I wonder.", "")
    assert (text.type, text.text) == ("text", "Let me look.")
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Oslo"})
    assert message.stop_reason == "tool_use"


def test_a_stream_has_the_same_blocks(said):
    client, _ = said(REASONED_CALL)
    with client.messages.stream(**ASK, tools=TOOLS) as stream:
        events = list(stream)
        message = stream.get_final_message()
    whole = said(REASONED_CALL)[0].messages.create(**ASK, tools=TOOLS)
    without_ids = [[block.to_dict() | {"id": None} for block in one.content] for one in (message, whole)]
    assert without_ids[0] == without_ids[1]
    assert message.stop_reason == "tool_use"
    begun = [event.content_block.type for event in events if event.type == "content_block_start"]
    assert begun == ["thinking", "text", "tool_use"]
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2]


def test_events_of_calls_are_those_of_the_providers_document(said):
    import json

    http = said(REASONED_CALL)[0]._client
    response = http.post("/v1/messages", json={**ASK, "tools": TOOLS, "stream": True})
    bodies = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    for body in bodies:
        if body["type"] != "ping":
            check("anthropic", "MessageStreamEvent", body)
    deltas = [body["delta"] for body in bodies if body["type"] == "content_block_delta"]
    assert "".join(one.get("partial_json", "") for one in deltas) == '{"city": "Oslo"}'


def test_a_call_that_is_cut_says_so(said):
    client, _ = said(REASONED_CALL[:-2], finish_reason="length")
    message = client.messages.create(**ASK, tools=TOOLS)
    assert message.stop_reason == "max_tokens"
    assert message.content[-1].type == "tool_use"
    assert message.content[-1].input == {}
    client, _ = said([*REASONED_CALL[:-2], 'ty": "Os'], finish_reason="length")
    assert client.messages.create(**ASK, tools=TOOLS).content[-1].input == {"city": "Os"}


def test_thoughts_may_be_left_out(said):
    client, _ = said(REASONED_CALL)
    message = client.messages.create(**ASK, tools=TOOLS, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[0].thinking == ""


def test_without_tools_a_call_is_text(said):
    client, _ = said([CALL])
    assert client.messages.create(**ASK).content[0].text == CALL
    message = client.messages.create(**ASK, tools=TOOLS, tool_choice={"type": "none"})
    assert message.content[0].text == CALL
    assert message.stop_reason == "end_turn"


def test_one_call_where_several_are_not_wanted(said):
    client, _ = said([CALL, "\n", CALL])
    both = client.messages.create(**ASK, tools=TOOLS)
    assert [block.type for block in both.content] == ["tool_use", "tool_use"]
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    one = client.messages.create(**ASK, tools=TOOLS, tool_choice=choice)
    assert [block.type for block in one.content] == ["tool_use"]


def test_what_was_said_and_done_is_in_the_prompt(said, tokenizer):
    client, engine = said(REASONED_CALL)
    first = client.messages.create(**ASK, tools=TOOLS)
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": [{"type": "text", "text": "rain"}]}
    messages = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And Rome?"}]},
    ]
    text = (
        'tools: {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": '
        '{"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": false}}; call as '
        '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>\n'
        f"user: Oslo?\nassistant: <think>\nI wonder.\n</think>\nLet me look.{CALL}\n"
        "tool weather: rain\nuser: And Rome?\nassistant: <think>\n\n</think>\n\n"
    )
    asked = {"model": "told", "messages": messages, "tools": TOOLS, "thinking": {"type": "disabled"}}
    client.messages.create(max_tokens=64, **asked)
    assert tokenizer.decode(engine.prompts[0]) == text
    assert client.messages.count_tokens(**asked).input_tokens == len(engine.prompts[0])
    with pytest.raises(anthropic.BadRequestError, match="must end with a message of the user"):
        client.messages.count_tokens(model="told", messages=messages[:2], tools=TOOLS)


def test_a_call_that_must_be_made_is_made(calling_model):
    with serving(calling_model, "--port", "0") as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)
        ask = {**ASK, "model": "tiny", "tools": TOOLS, "max_tokens": 200}
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            message = client.messages.create(
                **ask, tool_choice=choice, thinking={"type": "disabled"}, extra_body={"temperature": 0}
            )
            (call,) = message.content
            assert call.name == "weather"
            assert call.input["city"] in ("Oslo", "Rome")
            assert message.stop_reason == "tool_use"
        refused = httpx.post(
            f"{server.url}/v1/messages", json={**ask, "tool_choice": {"type": "tool", "name": "clock"}}
        )
        assert refused.json()["error"]["message"] == "'tool_choice.name' must be one of 'tools', got 'clock'."
