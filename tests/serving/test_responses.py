"""``/v1/responses`` of a real server process, asked through the ``openai`` client."""

import json
from types import SimpleNamespace
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel
from transformers import AutoTokenizer

from tests.helpers.provider_specs import check
from tests.helpers.server_process import serving

HELLO = "jumps over"
ASK = {"model": "tiny", "input": HELLO, "max_output_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(talking_model):
    with serving(talking_model, "--port", "0", "--grace", "3", "--max-num-seqs", "16", "--max-model-len", "512") as one:
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="any", max_retries=0, timeout=60)
        with httpx.Client(base_url=one.url, timeout=60) as http:
            yield SimpleNamespace(url=one.url, client=client, http=http)


@pytest.fixture
def client(server):
    return server.client


def chat_text(client, messages, **fields):
    """What the chat's route says to the same messages."""
    response = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0, **fields)
    return response.choices[0].message.content


def test_a_response_says_what_a_chat_says(client, talking_model):
    response = client.responses.create(**ASK, instructions="the lazy dog", metadata={"a": "b"})
    chat = [{"role": "system", "content": "the lazy dog"}, {"role": "user", "content": HELLO}]
    assert response.output_text == chat_text(client, chat)
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    tokenizer = AutoTokenizer.from_pretrained(talking_model)
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    usage = response.usage
    assert usage.input_tokens == len(tokenizer(prompt)["input_ids"])
    assert (usage.output_tokens, usage.total_tokens) == (8, usage.input_tokens + 8)
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert (response.instructions, response.metadata) == ("the lazy dog", {"a": "b"})
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0, 1, 8)
    assert response.store is False


def test_what_a_reply_declined_is_its_text(client):
    history = [{"role": "user", "content": HELLO}, {"role": "assistant", "content": "I will not."}]
    part = {"type": "refusal", "refusal": "I will not."}
    about = {"id": "msg_1", "status": "completed", "type": "message", "role": "assistant", "content": [part]}
    ask = {"role": "user", "content": "why"}
    response = client.responses.create(**{**ASK, "input": [history[0], about, ask]})
    assert response.output_text == chat_text(client, [*history, ask])


def test_vllm_s_sampling_extras_are_those_of_a_chat(client):
    sampled = {"top_k": 9, "min_p": 0.01, "seed": 5, "repetition_penalty": 1.1, "ignore_eos": True}
    asked = {**ASK, "temperature": 1.0, "extra_body": {**sampled, "presence_penalty": 0.5, "frequency_penalty": 0.2}}
    response = client.responses.create(**asked)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": HELLO}], max_tokens=8, temperature=1.0,
        presence_penalty=0.5, frequency_penalty=0.2, extra_body=sampled,
    )  # fmt: skip
    assert response.output_text == chat.choices[0].message.content
    assert response.output_text != client.responses.create(**ASK).output_text
    whole = client.responses.create(**ASK).output_text
    assert client.responses.create(**ASK, extra_body={"stop": whole[3]}).output_text == whole[: whole.index(whole[3])]


def test_items_of_every_way_to_write_a_message(client):
    expected = chat_text(
        client,
        [
            {"role": "system", "content": "be\nquick"},
            {"role": "user", "content": "the fox"},
            {"role": "assistant", "content": "jumps"},
            {"role": "user", "content": "over"},
        ],
    )
    items = [
        {"role": "developer", "content": "quick"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "the fox"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "jumps", "annotations": [], "logprobs": []}],
        },
        {"role": "user", "content": "over"},
    ]
    assert client.responses.create(**{**ASK, "input": items}, instructions="be").output_text == expected


def test_a_reply_can_be_sent_back(client):
    first = client.responses.create(**ASK)
    items = [{"role": "user", "content": HELLO}, *first.output, {"role": "user", "content": "the dog"}]
    expected = chat_text(
        client,
        [
            {"role": "user", "content": HELLO},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "the dog"},
        ],
    )
    assert client.responses.create(**{**ASK, "input": items}).output_text == expected


def test_a_stream_adds_up_to_the_response(client):
    whole = client.responses.create(**ASK)
    with client.responses.stream(**ASK) as stream:
        events = list(stream)
    final = events[-1].response  # the client's final response is a completed one alone
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == whole.output_text
    assert final.usage.output_tokens == 8
    assert final.status == "incomplete"


def events_of(response):
    parts = [part.split("\n") for part in response.text.split("\n\n") if part]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def test_responses_and_events_are_those_of_the_providers_document(server):
    body = {**ASK, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    check("openai", "Response", server.http.post("/v1/responses", json=body).json())
    events = events_of(server.http.post("/v1/responses", json={**body, "stream": True}))
    for at, (name, event) in enumerate(events):
        assert name == event["type"]
        assert event["sequence_number"] == at
        check("openai", "ResponseStreamEvent", event)
    kinds = [name for name, _ in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_log_probabilities_are_those_of_a_chat(client):
    asked = {**ASK, "include": ["message.output_text.logprobs"], "top_logprobs": 3}
    response = client.responses.create(**asked)
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": HELLO}],
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    found = response.output[0].content[0].logprobs
    expected = chat.choices[0].logprobs.content
    assert [(one.token, one.logprob) for one in found] == [(one.token, one.logprob) for one in expected]
    assert [[top.token for top in one.top_logprobs] for one in found] == [
        [top.token for top in one.top_logprobs] for one in expected
    ]
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    deltas = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    streamed = events[-1].response.output[0].content[0].logprobs
    assert [one.logprob for one in deltas] == [one.logprob for one in streamed] == [one.logprob for one in found]
    assert not client.responses.create(**ASK).output[0].content[0].logprobs


class Animal(BaseModel):
    animal: Literal["fox", "dog"]


def test_a_parsed_response(client):
    response = client.responses.parse(**{**ASK, "max_output_tokens": 64}, text_format=Animal)
    assert response.output_parsed.animal in ("fox", "dog")
    assert response.status == "completed"
    plain = client.responses.create(
        **{**ASK, "max_output_tokens": 64},
        text={"format": {"type": "json_schema", "name": "a", "schema": Animal.model_json_schema()}},
    )
    assert Animal.model_validate_json(plain.output_text)


def test_a_conversation_that_is_too_long_loses_its_oldest_messages(client):
    system = {"role": "system", "content": "the dog"}
    long = [{"role": role, "content": "fox " * 180 + "dog"} for role in ("user", "assistant", "user", "assistant")]
    items = [system, *long, {"role": "user", "content": HELLO}]
    with pytest.raises(openai.BadRequestError, match="<= 511 tokens"):
        client.responses.create(**{**ASK, "input": items})
    response = client.responses.create(**{**ASK, "input": items}, truncation="auto")
    fitting = client.responses.create(**{**ASK, "input": [system, *long[2:], items[-1]]})
    longer = [system, *long[1:], items[-1]]
    with pytest.raises(openai.BadRequestError, match="<= 511 tokens"):
        client.responses.create(**{**ASK, "input": longer})
    assert response.usage.input_tokens == fitting.usage.input_tokens
    assert response.output_text == fitting.output_text


def test_what_changes_no_token_is_accepted(client):
    same = client.responses.create(
        **ASK,
        store=True,
        user="u",
        prompt_cache_key="k",
        safety_identifier="s",
        extra_body={"service_tier": "auto"},
        background=False,
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low"},
        tools=[],
        tool_choice="auto",
        truncation="disabled",
        include=["reasoning.encrypted_content"],
    )
    assert same.output_text == client.responses.create(**ASK).output_text


WRONG = [
    ({"previous_response_id": "resp_1"}, "'previous_response_id' is 'resp_1', but this server stores nothing"),
    ({"background": True}, "'background' is True, but this server stores nothing"),
    ({"conversation": "conv_1"}, "'conversation' is 'conv_1', but this server stores nothing"),
    ({"prompt": {"id": "pmpt_1"}}, "'prompt' is {'id': 'pmpt_1'}, but this server stores nothing"),
    ({"input": None}, "'input' is required."),
    ({"input": []}, "'input' must be a list of at least 1, got []."),
    ({"input": 3}, "'input' must be text or a list of items, got 3."),
    ({"input": [{"type": "web_search_call"}]}, "'input[0].type' must be one of 'message', 'function_call', "),
    ({"input": [{"role": "user"}]}, "'input[0].content' is required."),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "'input[0].type' must be one of "),
    (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]},
        "'input[0]' has the result of a tool call 'c' that no message makes.",
    ),
    ({"include": ["everything"]}, "'include' must be some of "),
    ({"max_output_tokens": -1}, "'max_output_tokens' must be "),
    ({"tool_choice": "required"}, "'tool_choice' must be 'auto' or 'none' without 'tools'."),
    ({"tool_choice": {"type": "file_search"}}, "'tool_choice.type' must be one of 'function' or 'allowed_tools', got "),
    ({"metadata": {str(at): "a" for at in range(17)}}, "'metadata' must be a mapping of at most 16 fields, got {'0': "),
    ({"tools": [{"type": "web_search"}]}, "'tools[0].type' must be one of 'function', got 'web_search'."),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "'text.format.schema' is required with the type"),
    ({"messages": []}, "Unknown field 'messages'"),
    ({"top_logprobs": 21}, "'top_logprobs' must be <= 20, got 21."),
    ({"truncation": "some"}, "'truncation' must be one of 'auto' or 'disabled', got 'some'."),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=lambda value: None)
def test_a_wrong_request_is_one_sentence(server, fields, words):
    response = server.http.post("/v1/responses", json={**ASK, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    check("openai", "ErrorResponse", response.json())
    assert words in error["message"]
    assert error["message"].endswith((".", "?"))
