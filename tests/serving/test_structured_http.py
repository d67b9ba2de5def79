"""``response_format`` and ``structured_outputs`` over HTTP, streamed and not."""

import datetime
import json
import re
from typing import Literal

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field

from tests.helpers.json_schemas import violation
from tests.helpers.tool_template import TEMPLATE
from toolkit.engine import AsyncEngine, Engine
from toolkit.loading import load_model
from toolkit.serving.anthropic.requests import MessagesRequest
from toolkit.serving.app import ServerConfig, create_app
from toolkit.serving.errors import RequestError
from toolkit.serving.ollama.requests import OllamaGenerateRequest
from toolkit.serving.openai.completion_request import CompletionRequest
from toolkit.serving.openai.requests import ChatRequest
from toolkit.serving.parsing import parse
from toolkit.serving.responses.requests import ResponsesRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
TAG = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]}


@pytest.fixture(scope="module")
def client(chat_model):
    model, tokenizer = load_model(str(chat_model))
    with Engine(model, tokenizer, max_model_len=512) as engine:
        config = ServerConfig("tiny", AsyncEngine(engine), tokenizer=tokenizer, max_model_len=512, vocab_size=320)
        with TestClient(create_app(config)) as client:
            yield client


def body_of(path: str, **fields) -> dict:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {**asked, "max_tokens": 200, "seed": 0, **fields}


def choice_of(client: TestClient, path: str, **fields) -> tuple[str, str]:
    """(text, finish reason) of the one choice, streamed or not."""
    response = client.post(path, json=body_of(path, **fields))
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        (choice,) = response.json()["choices"]
        return choice["message"]["content"] if path == CHAT else choice["text"], choice["finish_reason"]
    choices = [json.loads(line[6:])["choices"][0] for line in response.text.splitlines() if line.startswith("data: {")]
    text = "".join(one["delta"].get("content", "") if path == CHAT else one["text"] for one in choices)
    return text, choices[-1]["finish_reason"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": NAMED}, None),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, r'\{"kind":"[ab]","n":\d\d?\}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}, "response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"regex": "[0-9]{3}", "json": None}}, "[0-9]{3}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]\n'}}, "a[0-9]"),
    ],
)
def test_responses_have_the_form_that_was_asked_for(client, path, stream, fields, pattern):
    text, reason = choice_of(client, path, stream=stream, **fields)
    assert reason == "stop"
    if pattern is None:
        assert violation(SCHEMA, text) is None
    else:
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_objects_and_tags(client, path):
    text, reason = choice_of(client, path, response_format={"type": "json_object"}, max_tokens=60)
    assert text.lstrip().startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)
    for fields in (
        {"structured_outputs": {"structural_tag": TAG}},
        {"response_format": {"type": "structural_tag", **TAG}},
    ):
        text, _ = choice_of(client, path, max_tokens=30, **fields)
        assert "<f" not in text or "<f>{" in text
    text, _ = choice_of(
        client, path, response_format={"type": "json_schema", "json_schema": {"name": "x"}}, max_tokens=9
    )
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "'response_format.json_schema.schema' must not have 'not' in a JSON schema, which cannot be enforced.",
            "response_format.json_schema.schema",
        ),
        (
            {"structured_outputs": {"regex": "(?=a)"}},
            "structured_outputs.regex must be what can be enforced, got one that is not (look-around",
            "structured_outputs",
        ),
        ({"structured_outputs": {}}, "structured_outputs must have one of json, regex", "structured_outputs"),
        (
            {"structured_outputs": {"json": 3}},
            "structured_outputs.json must be a JSON object or its text, got 3.",
            None,
        ),
        (
            {"structured_outputs": {"jso": {}}},
            "'structured_outputs.jso'; did you mean 'json'?",
            "structured_outputs.jso",
        ),
        ({"structured_outputs": {"choice": "a"}}, "'structured_outputs.choice' must be a list, got 'a'.", None),
        ({"structured_outputs": "x"}, "'structured_outputs' must be a mapping of fields, got 'x'.", None),
        ({"response_format": {"type": "xml"}}, "'response_format.type' must be one of", "response_format.type"),
        ({"response_format": {}}, "'response_format.type' is required.", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "'response_format.json_schema' is required with the type 'json_schema'.",
            "response_format",
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "x"}}},
            "'response_format.json_schema' must not be given with the type 'json_object'.",
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "shema": {}}}},
            "did you mean 'schema'?",
            "response_format.json_schema.shema",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "'structured_outputs' is given, and so is 'response_format'; give one.",
            "structured_outputs",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(client, path, fields, message, param):
    response = client.post(path, json=body_of(path, **fields))
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_form_beside_reasoning_and_tools_is_named_as_the_request_names_it(chat_model):
    """There the form is a part of a grammar, of which no client knows."""
    model, tokenizer = load_model(str(chat_model))
    tokenizer.chat_template = TEMPLATE
    nowhere, call = {"$ref": "http://example.org/schema"}, {"name": "look", "parameters": {"type": "object"}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": nowhere}}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    field = "response_format.json_schema.schema"
    cases = [
        (CHAT, {**asked, "response_format": form}, field),
        (CHAT, {**asked, "response_format": form, "tools": [{"type": "function", "function": call}]}, field),
        (
            "/v1/messages",
            {**asked, "output_config": {"format": {"type": "json_schema", "schema": nowhere}}},
            "output_config.format.schema",
        ),
        (
            "/v1/responses",
            {"input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": nowhere}}},
            "text.format.schema",
        ),
        ("/api/chat", {"model": "tiny", "messages": asked["messages"], "format": nowhere}, "format"),
    ]
    with Engine(model, tokenizer, max_model_len=512) as engine:
        config = ServerConfig("tiny", AsyncEngine(engine), tokenizer=tokenizer, max_model_len=512, vocab_size=320)
        with TestClient(create_app(config)) as client:
            for path, body, named in cases:
                response = client.post(path, json=body)
                assert response.status_code == 400, response.text
                error = response.json()["error"]
                message = error if isinstance(error, str) else error["message"]
                assert message.startswith(f"'{named}' must be what can be enforced"), message


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_model_that_writes_whitespace_comes_to_an_end(client, path):
    (newline,) = client.post("/tokenize", json={"prompt": "\n", "add_special_tokens": False}).json()["tokens"]
    bias = {"logit_bias": {str(newline): 50}, "temperature": 0}
    text, reason = choice_of(client, path, response_format=NAMED, max_tokens=400, **bias)
    assert reason == "stop"
    assert violation(SCHEMA, text) is None
    assert max(map(len, re.findall(r"\s+", text))) == 33
    text, reason = choice_of(client, path, structured_outputs={"json": SCHEMA}, max_tokens=100, **bias)
    assert (text.strip(), reason) == ("{", "length")


@pytest.mark.parametrize(
    ("kind", "body", "of_schema"),
    [
        (ResponsesRequest, {"input": "a", "text": {"format": {"type": "json_object"}}}, False),
        (ResponsesRequest, {"input": "a", "text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, True),
        (OllamaGenerateRequest, {"model": "a", "prompt": "a", "format": "json"}, False),
        (OllamaGenerateRequest, {"model": "a", "prompt": "a", "format": SCHEMA}, True),
        (
            MessagesRequest,
            {
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 4,
                "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            },
            True,
        ),
    ],
)
def test_other_protocols_ask_for_the_form_that_response_format_is(kind, body, of_schema):
    response_format = NAMED if of_schema else {"type": "json_object"}
    chat = parse(ChatRequest, json.dumps(body_of(CHAT, response_format=response_format)).encode())
    form = chat.sampling()["structured_outputs"]
    assert form["whitespace_pattern"]
    assert parse(kind, json.dumps(body).encode()).sampling()["structured_outputs"] == form


def test_requests_for_text_ask_for_nothing():
    for kind, asked in ((ChatRequest, body_of(CHAT)), (CompletionRequest, body_of(COMPLETIONS))):
        plain = parse(kind, json.dumps(asked).encode()).sampling()
        for fields in ({"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}):
            assert parse(kind, json.dumps({**asked, **fields}).encode()).sampling() == plain
    with pytest.raises(RequestError):
        parse(ChatRequest, json.dumps(body_of(CHAT, response_format="text")).encode())


def test_the_document_shows_the_fields(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        assert {"response_format", "structured_outputs"} <= set(schemas[name]["properties"])
    assert {"json", "regex", "choice", "grammar", "json_object", "structural_tag"} <= set(
        schemas["StructuredOutputs"]["properties"]
    )
    assert {"name", "schema", "strict"} <= set(schemas["JsonSchemaFormat"]["properties"])


def test_a_server_without_a_tokenizer_says_so(chat_model):
    model, _ = load_model(str(chat_model))
    with Engine(model) as engine, TestClient(create_app(ServerConfig("tiny", AsyncEngine(engine)))) as client:
        response = client.post(COMPLETIONS, json={"prompt": [1, 2], "structured_outputs": {"regex": "a"}})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "structured_outputs needs a tokenizer, and the engine has none."


class Address(BaseModel):
    """Nested in ``Person``."""

    street: str = Field(max_length=8)
    number: int = Field(ge=1, le=99)


class Person(BaseModel):
    """With what pydantic writes schemas of."""

    kind: Literal["a", "b"]
    share: float = Field(gt=0, lt=1)
    tags: list[Literal["x", "y"]] = Field(max_length=2)
    address: Address | None
    born: datetime.date


@pytest.mark.parametrize("seed", range(3))
def test_openai_s_client_parses_what_it_asked_for(client, seed):
    openai = pytest.importorskip("openai")
    asked = openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=client)
    parsed = asked.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "hi"}], response_format=Person, seed=seed, max_tokens=400,
        extra_body={"top_k": 20},
    )  # fmt: skip
    (choice,) = parsed.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)
