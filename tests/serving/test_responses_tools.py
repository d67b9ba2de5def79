"""Functions and reasoning in ``/v1/responses``, through the ``openai`` client."""

import json

import openai
import pytest
from transformers import AutoTokenizer

from tests.helpers.provider_specs import check
from tests.helpers.saying_engine import saying_clients
from tests.helpers.server_process import serving
from tests.helpers.tool_template import CALL, REASONED_CALL, TEMPLATE, WEATHER

TOOLS = [{"type": "function", "name": "weather", "description": "of a city", "parameters": WEATHER, "strict": False}]
ASK = {"model": "told", "input": "Oslo?", "tools": TOOLS}


@pytest.fixture(scope="module")
def tokenizer(chat_model):
    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture
def said(tokenizer):
    """Makes a client of a model that says chunks of text."""

    def connect(http):
        return openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)

    with saying_clients(tokenizer, TEMPLATE, connect) as make:
        yield make


def test_reasoning_text_and_a_call_are_items(said):
    client, _ = said(REASONED_CALL)
    response = client.responses.create(**ASK)
    reasoning, message, call = response.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "I wonder.", [])
    assert message.content[0].text == response.output_text == "Let me look."
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Oslo"})
    assert call.call_id != call.id
    assert {item.status for item in response.output} == {"completed"}
    assert response.status == "completed"
    # The chunk that ends the reasoning is the third of nine.
    assert response.usage.output_tokens_details.reasoning_tokens == 3
    assert response.tools[0].name == "weather"


def test_a_stream_has_the_same_items(said):
    client, _ = said(REASONED_CALL)
    with client.responses.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_response()
    whole = said(REASONED_CALL)[0].responses.create(**ASK)
    assert final.output_text == whole.output_text
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output[2].arguments == whole.output[2].arguments
    assert final.usage == whole.usage
    added = [event.item.type for event in events if event.type == "response.output_item.added"]
    assert added == ["reasoning", "message", "function_call"]
    arguments = [event for event in events if event.type.startswith("response.function_call_arguments")]
    assert "".join(event.delta for event in arguments[:-1]) == arguments[-1].arguments == '{"city": "Oslo"}'
    reasoning = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(reasoning) == "I wonder."


def test_responses_and_events_are_those_of_the_providers_document(said):
    http = said(REASONED_CALL)[0]._client
    check("openai", "Response", http.post("/v1/responses", json=ASK).json())
    streamed = http.post("/v1/responses", json={**ASK, "stream": True}).text
    bodies = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    assert [body["sequence_number"] for body in bodies] == list(range(len(bodies)))
    for body in bodies:
        check("openai", "ResponseStreamEvent", body)
    assert bodies[-1]["type"] == "response.completed"


def test_a_call_that_is_cut_is_incomplete(said):
    client, _ = said(REASONED_CALL[:-2], finish_reason="length")
    response = client.responses.create(**ASK)
    assert response.status == response.output[-1].status == "incomplete"
    assert response.output[-1].type == "function_call"


def test_what_was_said_and_done_is_in_the_prompt(said, tokenizer):
    client, engine = said(REASONED_CALL)
    first = client.responses.create(**ASK)
    result = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "rain"}
    items = [{"role": "user", "content": "Oslo?"}, *first.output, result]
    client.responses.create(**{**ASK, "input": items}, instructions="Be brief.", reasoning={"effort": "none"})
    prompt = tokenizer.decode(engine.prompts[0])
    assert prompt.startswith('tools: {"name": "weather"')
    assert prompt.endswith(
        f"system: Be brief.\nuser: Oslo?\nassistant: <think>\nI wonder.\n</think>\nLet me look.{CALL}\n"
        "tool weather: rain\nassistant: <think>\n\n</think>\n\n"
    )


def test_the_choice_among_tools(said):
    client, _ = said([CALL, "\n", CALL])

    def types(**fields):
        return [item.type for item in client.responses.create(**ASK, **fields).output]

    assert types() == ["function_call", "function_call"]
    assert types(parallel_tool_calls=False) == ["function_call"]
    assert types(tool_choice="none") == ["message"]
    with pytest.raises(openai.BadRequestError, match="must name some of 'tools', got 'clock'"):
        client.responses.create(**ASK, tool_choice={"type": "function", "name": "clock"})


def test_a_call_that_must_be_made_is_made(calling_model):
    with serving(calling_model, "--port", "0") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        ask = {**ASK, "model": "tiny", "temperature": 0, "max_output_tokens": 200, "reasoning": {"effort": "none"}}
        allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
        for choice in ("required", {"type": "function", "name": "weather"}, allowed):
            (call,) = client.responses.create(**ask, tool_choice=choice, parallel_tool_calls=False).output
            assert call.name == "weather"
            assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
