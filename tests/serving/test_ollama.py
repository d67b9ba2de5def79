"""``/api`` of a real server process, asked through the ``ollama`` client."""

import asyncio
import json
import re
from types import SimpleNamespace

import httpx
import ollama
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.saying_engine import saying_clients
from tests.helpers.server_process import serving
from tests.helpers.tool_template import CALL, REASONED_CALL, TEMPLATE, WEATHER
from toolkit import __version__
from toolkit.serving.ollama.weights import WeightsInMemory
from toolkit.testing.models import random_model

HELLO = [{"role": "user", "content": "jumps over"}]
GREEDY = {"temperature": 0, "num_predict": 8}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}}]


@pytest.fixture(scope="module")
def server(talking_model):
    options = ("--port", "0", "--grace", "3", "--max-num-seqs", "16", "--max-model-len", "512")
    with serving(talking_model, *options) as one, httpx.Client(base_url=one.url, timeout=60) as http:
        yield SimpleNamespace(url=one.url, client=ollama.Client(one.url), http=http)


@pytest.fixture
def client(server):
    return server.client


def chat_text(server, messages):
    """What OpenAI's route says to the same messages."""
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    return server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_a_chat_says_what_the_other_protocol_says(client, server, talking_model):
    messages = [{"role": "system", "content": "the lazy dog"}, *HELLO]
    response = client.chat("tiny", messages, options=GREEDY)
    assert response.message.content == chat_text(server, messages)
    assert (response.model, response.message.role) == ("tiny", "assistant")
    assert (response.done, response.done_reason) == (True, "length")
    tokenizer = AutoTokenizer.from_pretrained(talking_model)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert (response.prompt_eval_count, response.eval_count) == (len(tokenizer(prompt)["input_ids"]), 8)
    assert response.total_duration >= response.prompt_eval_duration + response.eval_duration > 0
    assert response.prompt_eval_duration > 0 < response.eval_duration


def test_a_stream_adds_up_to_the_chat(client):
    whole = client.chat("tiny:latest", HELLO, options=GREEDY)
    *chunks, last = client.chat("tiny", HELLO, options=GREEDY, stream=True)
    assert "".join(chunk.message.content for chunk in chunks) == whole.message.content
    assert not any(chunk.done for chunk in chunks)
    assert (last.done, last.done_reason, last.eval_count, last.message.content) == (True, "length", 8, "")


def test_lines_are_what_is_sent_unless_a_request_wants_one_object(server):
    body = {"model": "tiny", "messages": HELLO, "options": GREEDY}
    streamed = server.http.post("/api/chat", json=body)
    assert streamed.headers["content-type"] == "application/x-ndjson"
    assert json.loads(streamed.text.splitlines()[-1])["done"]
    whole = server.http.post("/api/chat", json={**body, "stream": False})
    assert whole.headers["content-type"] == "application/json"
    assert whole.json()["done"]


def test_a_prompt_is_a_chat_unless_it_is_raw(client, server):
    messages = [{"role": "system", "content": "the lazy dog"}, *HELLO]
    generated = client.generate("tiny", "jumps over", system="the lazy dog", options=GREEDY)
    assert generated.response == chat_text(server, messages)
    raw = client.generate("tiny", "the quick", raw=True, options=GREEDY)
    body = {"prompt": "the quick", "max_tokens": 8, "temperature": 0}
    assert raw.response == server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    *chunks, last = client.generate("tiny", "the quick", raw=True, options=GREEDY, stream=True)
    assert "".join(chunk.response for chunk in chunks) == raw.response
    assert last.done_reason == "length"


def test_options_are_those_of_the_sampler(client, server):
    text = client.chat("tiny", HELLO, options=GREEDY).message.content
    stopped = client.chat("tiny", HELLO, options={**GREEDY, "stop": [text[3:5]], "num_ctx": 4096})
    assert stopped.message.content == text[: text.index(text[3:5])]
    assert stopped.done_reason == "stop"
    seeded = [client.chat("tiny", HELLO, options={"seed": 3, "num_predict": 8}).message.content for _ in range(2)]
    assert seeded[0] == seeded[1]
    # As many tokens as the model's length allows.
    long = client.chat("tiny", HELLO, options={"temperature": 0, "num_predict": 100_000})
    assert long.prompt_eval_count + long.eval_count == 512
    penalised = client.chat("tiny", HELLO, options={**GREEDY, "repeat_penalty": 2.0}).message.content
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 0, "repetition_penalty": 2.0}
    assert penalised == server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_formats_are_kept(client):
    found = client.chat("tiny", HELLO, format=WEATHER, options={"temperature": 0, "num_predict": 64})
    assert json.loads(found.message.content)["city"] in ("Oslo", "Rome")
    found = client.generate("tiny", "jumps", format="json", options={"temperature": 0, "num_predict": 5})
    assert found.response.lstrip().startswith("{")


def test_log_probabilities(client):
    response = client.chat("tiny", HELLO, options=GREEDY, logprobs=True, top_logprobs=2)
    assert len(response.logprobs) == 8
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in response.logprobs)
    chunks = list(client.chat("tiny", HELLO, options=GREEDY, logprobs=True, top_logprobs=2, stream=True))
    streamed = [one.logprob for chunk in chunks for one in chunk.logprobs or ()]
    assert streamed == [one.logprob for one in response.logprobs]


def test_what_is_served(client, server, talking_model):
    (listed,) = client.list().models
    assert listed.model == "tiny"
    parameters = AutoModelForCausalLM.from_pretrained(talking_model).num_parameters()
    assert (listed.size, listed.details.parameter_size) == (4 * parameters, f"{parameters / 1e3:.1f}K")
    (running,) = client.ps().models
    assert running.digest == listed.digest
    assert (running.size, running.size_vram) == (listed.size, 0)
    assert (running.model, running.context_length) == ("tiny", 512)
    shown = client.show("tiny")
    assert shown.modelinfo == {"general.architecture": "llama", "llama.context_length": 512}
    assert "completion" in shown.capabilities
    assert "vision" not in shown.capabilities
    assert "messages" in shown.template
    older = server.http.post("/api/show", json={"name": "tiny"}).json()
    assert older["template"] == shown.template
    assert server.http.get("/api/version").json() == {"version": __version__}
    for loading in (client.chat("tiny", []), client.generate("tiny", "", keep_alive=0)):
        assert (loading.done, loading.done_reason) == (True, "load")


def test_a_digest_is_of_the_weights_and_of_their_version():
    def held(**sizes):
        return WeightsInMemory.of(SimpleNamespace(engine=SimpleNamespace(model=random_model("llama", **sizes))))

    one, other = held(), held(vocabulary=300)
    assert re.fullmatch("[0-9a-f]{64}", one.digest(0, ""))
    assert one.digest(0, "") == held().digest(0, "")
    assert len({one.digest(0, ""), one.digest(1, ""), one.digest(0, "folder"), other.digest(0, "")}) == 4
    assert WeightsInMemory.of(None) == WeightsInMemory()
    assert WeightsInMemory().digest(0, "") == ""


def test_the_asynchronous_client(server):
    async def ask():
        return await ollama.AsyncClient(server.url).chat("tiny", HELLO, options=GREEDY, keep_alive="5m")

    assert asyncio.run(ask()).eval_count == 8


WRONG = [
    ("chat", {"model": "large"}, 404, "'model' must be 'tiny', got 'large'."),
    ("chat", {"model": None}, 400, "'model' is required."),
    ("chat", {"messages": [{"role": "usr", "content": ""}]}, 400, "'messages[0].role' must be one of 'system', 'user'"),
    ("chat", {"options": {"temprature": 1}}, 400, "did you mean 'temperature'?"),
    ("chat", {"options": {"mirostat": 1}}, 400, "'mirostat' is 1, but this server does not offer 'mirostat'."),
    ("chat", {"options": {"top_p": 3}}, 400, "'options.top_p' must be "),
    ("chat", {"messages": [{"role": "user", "content": "", "images": ["AA"]}]}, 400, "takes no images"),
    ("chat", {"think": "deeply"}, 400, "'think' must be "),
    ("generate", {"prompt": "a", "template": "{{ .Prompt }}"}, 400, "this server does not offer 'template'."),
    ("generate", {"prompt": "a", "context": [1]}, 400, "this server does not offer 'context'."),
    ("generate", {"prompt": "a", "suffix": "b"}, 400, "has no fill-in-the-middle tokens"),
    ("generate", {"prompt": "a", "format": 3}, 400, "'format' must be 'json' or a JSON schema, got 3."),
    ("show", {"model": "large"}, 404, "'model' must be 'tiny', got 'large'."),
    ("pull", {}, 400, "none is pulled, made or copied over HTTP."),
    ("nothing", {}, 404, "There is no POST /api/nothing."),
    ("embeddings", {}, 404, "There is no POST /api/embeddings; use /api/embed."),
    ("embed", {"input": "a"}, 400, "The served model generates"),
]


@pytest.mark.parametrize(("route", "fields", "status", "words"), WRONG, ids=lambda value: None)
def test_a_wrong_request_is_one_sentence(server, route, fields, status, words):
    body = {"model": "tiny", **({"messages": HELLO} if route == "chat" else {}), **fields}
    response = server.http.post(f"/api/{route}", json=body)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert words in response.json()["error"]


def test_errors_are_raised_by_the_client(client):
    with pytest.raises(ollama.ResponseError, match="must be 'tiny', got 'large'") as raised:
        client.chat("large", HELLO)
    assert raised.value.status_code == 404


@pytest.fixture
def said(chat_model, monkeypatch):
    """Makes a client of a model that says chunks of text."""

    def connect(http):
        client = ollama.Client("http://testserver")
        monkeypatch.setattr(client, "_client", http)
        return client

    with saying_clients(AutoTokenizer.from_pretrained(chat_model), TEMPLATE, connect) as make:
        yield make


def test_thoughts_text_and_calls_are_apart(said):
    client, _ = said(REASONED_CALL)
    message = client.chat("told", [{"role": "user", "content": "Oslo?"}], tools=TOOLS, think=True).message
    assert (message.thinking, message.content) == ("I wonder.", "Let me look.")
    (call,) = message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "Oslo"})
    *chunks, last = client.chat("told", HELLO, tools=TOOLS, stream=True)
    assert "".join(chunk.message.thinking or "" for chunk in chunks) == "I wonder."
    assert "".join(chunk.message.content for chunk in chunks) == "Let me look."
    assert [call.function.name for chunk in chunks for call in chunk.message.tool_calls or ()] == ["weather"]
    assert last.done_reason == "stop"
    cut, _ = said([*REASONED_CALL[:-2], 'ty": "Os'], finish_reason="length")
    assert cut.chat("told", HELLO, tools=TOOLS).message.tool_calls[0].function.arguments == {"city": "Os"}
    generated = client.generate("told", "Oslo?")
    assert (generated.thinking, generated.response.startswith("Let me look.")) == ("I wonder.", True)
    # What is raw has no thoughts apart.
    assert client.generate("told", "Oslo?", raw=True).response == "".join(REASONED_CALL)


def test_what_was_said_and_done_is_in_the_prompt(said, chat_model):
    client, engine = said(REASONED_CALL)
    first = client.chat("told", [{"role": "user", "content": "Oslo?"}], tools=TOOLS).message
    messages = [
        {"role": "user", "content": "Oslo?"},
        first,
        {"role": "tool", "tool_name": "weather", "content": "rain"},
    ]
    client.chat("told", messages, tools=TOOLS, think=False)
    prompt = AutoTokenizer.from_pretrained(chat_model).decode(engine.prompts[0])
    assert prompt.startswith('tools: {"name": "weather"')
    assert prompt.endswith(
        f"user: Oslo?\nassistant: <think>\nI wonder.\n</think>\nLet me look.{CALL}\n"
        "tool weather: rain\nassistant: <think>\n\n</think>\n\n"
    )
