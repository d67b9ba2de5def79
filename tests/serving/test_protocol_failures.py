"""An engine that fails, or is shutting down, in the form of each protocol, before and within a stream."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import anthropic
import httpx
import ollama
import openai
import pytest
from transformers import AutoTokenizer

from tests.helpers.app_on_port import on_a_port
from tests.helpers.provider_specs import check
from tests.helpers.told_engine import ToldEngine, client_of

HELLO = [{"role": "user", "content": "x"}]
FAILED = "The request failed in the engine: it broke"


@contextmanager
def clients_of(engine, chat_model):
    """(engine, and its clients of Messages, Responses and Ollama, and of HTTP), on a socket."""
    test_client, async_engine = client_of(engine, tokenizer=AutoTokenizer.from_pretrained(chat_model))
    with on_a_port(test_client.app) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield SimpleNamespace(
            engine=async_engine,
            messages=anthropic.Anthropic(base_url=url, api_key="any", max_retries=0).messages,
            responses=openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0).responses,
            ollama=ollama.Client(url),
            http=http,
        )


def test_an_engine_that_fails(chat_model):
    with clients_of(ToldEngine(error="it broke"), chat_model) as served:
        ask = {"model": "told", "max_tokens": 3, "messages": HELLO}
        with pytest.raises(anthropic.InternalServerError) as raised:
            served.messages.create(**ask)
        check("anthropic", "ErrorResponse", raised.value.body)
        assert raised.value.body["error"] == {"type": "api_error", "message": FAILED}
        with pytest.raises(anthropic.APIStatusError, match=FAILED), served.messages.stream(**ask) as stream:
            stream.get_final_message()

        with pytest.raises(openai.InternalServerError, match=FAILED):
            served.responses.create(model="told", input="x")
        with served.responses.stream(model="told", input="x") as stream:
            *_, last = list(stream)
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert (last.response.error.code, last.response.error.message) == ("server_error", FAILED)
        lines = served.http.post("/v1/responses", json={"input": "x", "stream": True}).text.splitlines()
        for line in lines:
            if line.startswith("data: "):
                check("openai", "ResponseStreamEvent", json.loads(line[6:]))

        with pytest.raises(ollama.ResponseError, match=FAILED) as raised:
            served.ollama.chat("told", HELLO)
        assert raised.value.status_code == 500
        with pytest.raises(ollama.ResponseError, match=FAILED):
            list(served.ollama.chat("told", HELLO, stream=True))


def test_an_engine_that_is_shutting_down(chat_model):
    with clients_of(ToldEngine(), chat_model) as served:
        served.engine.draining = True
        with pytest.raises(anthropic.APIStatusError) as raised:
            served.messages.create(model="told", max_tokens=3, messages=HELLO)
        assert raised.value.status_code == 503
        assert raised.value.body["error"]["type"] == "overloaded_error"
        assert raised.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.InternalServerError) as raised:
            served.responses.create(model="told", input="x")
        assert raised.value.status_code == 503
        with pytest.raises(ollama.ResponseError, match="shutting down") as raised:
            served.ollama.generate("told", "x")
        assert raised.value.status_code == 503
