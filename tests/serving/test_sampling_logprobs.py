"""``sampling_logprobs`` over HTTP: log-probabilities after masks, beside the model's own, streamed and not."""

import json
import math

import pytest
import torch
from fastapi.testclient import TestClient

from toolkit.engine import AsyncEngine, Engine
from toolkit.serving.app import ServerConfig, create_app
from toolkit.testing.models import random_model, tiny_tokenizer

CHAT, COMPLETIONS, TOKENS = "/v1/chat/completions", "/v1/completions", "/inference/v1/generate"
PROMPT = [5, 6, 7]
ALLOWED = [9, 30, 77, 120]


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture(scope="module")
def web(model):
    tokenizer = tiny_tokenizer()
    with Engine(model, tokenizer, num_blocks=64, max_model_len=128) as engine:
        config = ServerConfig("tiny", AsyncEngine(engine), tokenizer=tokenizer, max_model_len=128, vocab_size=331)
        with TestClient(create_app(config)) as client:
            yield client


def body_of(path, **sampling):
    asked = {"max_tokens": 6, "seed": 3, "temperature": 0.5, "logprobs": 0, "allowed_token_ids": ALLOWED, **sampling}
    if path == TOKENS:
        return {"token_ids": PROMPT, "sampling_params": asked, "return_sampling_logprobs": True}
    asked |= {"return_sampling_logprobs": True, "return_token_ids": True}
    if path == CHAT:
        return {"messages": [{"role": "user", "content": "hi"}], **asked, "logprobs": True}
    return {"prompt": PROMPT, **asked}


def streamed(web, path, body):
    response = web.post(path, json={**body, "stream": True})
    return [json.loads(one[6:])["choices"][0] for one in response.text.splitlines() if one.startswith("data: {")]


def raw_of(choice):
    found = choice["logprobs"]
    return found["token_logprobs"] if "token_logprobs" in found else [one["logprob"] for one in found["content"]]


@pytest.mark.parametrize("path", [COMPLETIONS, TOKENS])
def test_both_log_probabilities_are_those_of_torch(web, model, path):
    (choice,) = web.post(path, json=body_of(path)).json()["choices"]
    tokens, masked, raw = choice["token_ids"], choice["sampling_logprobs"], raw_of(choice)
    assert len(tokens) == len(masked) == len(raw) == 6
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].double()
    for row, token, own, sampled in zip(logits, tokens, raw, masked, strict=True):
        assert token in ALLOWED
        assert math.isclose(own, row.log_softmax(-1)[token].item(), abs_tol=1e-4)
        among = (row[ALLOWED] / 0.5).log_softmax(-1)[ALLOWED.index(token)].item()
        assert math.isclose(sampled, among, abs_tol=1e-4)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, TOKENS])
def test_a_stream_has_the_same_numbers(web, path):
    body = body_of(path)
    (whole,) = web.post(path, json=body).json()["choices"]
    chunks = [one for one in streamed(web, path, body) if one.get("sampling_logprobs") is not None]
    assert [value for one in chunks for value in one["sampling_logprobs"]] == whole["sampling_logprobs"]
    assert [token for one in chunks for token in one["token_ids"]] == whole["token_ids"]
    assert len(whole["sampling_logprobs"]) == 6


def test_greedy_tokens_are_certain_and_nobody_gets_what_was_not_asked_for(web):
    greedy = web.post(COMPLETIONS, json=body_of(COMPLETIONS, temperature=0)).json()
    assert greedy["choices"][0]["sampling_logprobs"] == [0.0] * 6
    plain = web.post(COMPLETIONS, json={"prompt": PROMPT, "max_tokens": 2, "logprobs": 1}).json()
    assert "sampling_logprobs" not in plain["choices"][0]
    wrong = web.post(TOKENS, json={"token_ids": PROMPT, "sampling_params": {"return_sampling_logprobs": True}})
    assert wrong.json()["error"]["message"] == "'sampling_params' must have no 'return_sampling_logprobs'."


ASKED = {"temperature": 0.5, "seed": 3, "top_k": 3}
RESPONSES = {"input": "hi", "max_output_tokens": 6, **ASKED, "include": ["message.output_text.logprobs"]}
OLLAMA = {"model": "tiny", "options": {**ASKED, "num_predict": 6}, "logprobs": True, "stream": False}


def text_entries(reply):
    return reply["output"][0]["content"][0]["logprobs"]


@pytest.mark.parametrize(
    ("path", "body", "entries"),
    [
        ("/v1/responses", RESPONSES, text_entries),
        ("/api/chat", {**OLLAMA, "messages": [{"role": "user", "content": "hi"}]}, lambda reply: reply["logprobs"]),
        ("/api/generate", {**OLLAMA, "prompt": "hi"}, lambda reply: reply["logprobs"]),
    ],
)
def test_protocols_that_show_log_probabilities_show_both(web, path, body, entries):
    chat = {"messages": [{"role": "user", "content": "hi"}], **ASKED, "max_tokens": 6, "logprobs": True}
    (choice,) = web.post(CHAT, json={**chat, "return_sampling_logprobs": True}).json()["choices"]
    asked = {**body, "return_sampling_logprobs": True}
    whole = entries(web.post(path, json=asked).json())
    assert [one["sampling_logprob"] for one in whole] == choice["sampling_logprobs"]
    assert [one["logprob"] for one in whole] == raw_of(choice) != choice["sampling_logprobs"]
    lines = [one.removeprefix("data: ") for one in web.post(path, json={**asked, "stream": True}).text.splitlines()]
    events = [json.loads(one) for one in lines if one.startswith("{")]
    if path == "/v1/responses":
        assert text_entries(events[-1]["response"]) == whole
        events = [one for one in events if one["type"] == "response.output_text.delta"]
    assert [entry for one in events for entry in one.get("logprobs", [])] == whole
    assert all("sampling_logprob" not in one for one in entries(web.post(path, json=body).json()))


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (
            "/v1/responses",
            {"input": "hi"},
            "'return_sampling_logprobs' is true, but 'include' does not have 'message.output_text.logprobs'.",
        ),
        (
            "/api/chat",
            {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
            "'return_sampling_logprobs' is true, but 'logprobs' is not true.",
        ),
        (
            "/v1/messages",
            {"max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]},
            "'return_sampling_logprobs' is True, but this server does not offer 'return_sampling_logprobs'; "
            "its protocol has no place for log-probabilities, use /v1/chat/completions.",
        ),
    ],
)
def test_where_they_cannot_be_shown(web, path, body, said):
    response = web.post(path, json={**body, "return_sampling_logprobs": True})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error if isinstance(error, str) else error["message"]) == said
