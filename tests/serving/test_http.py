"""The HTTP around the routes, in one process: keys, origins, methods, names, ids, the OpenAPI document."""

import asyncio
import json
from pathlib import Path

import pytest

import toolkit
from tests.helpers.told_engine import PROMPT, ToldEngine, client_of
from toolkit.engine import SamplingParams
from toolkit.errors import ToolkitError
from toolkit.serving.access import ApiKeys, Cors
from toolkit.serving.app import PROTOCOLS
from toolkit.serving.openai.completion_request import CompletionRequest
from toolkit.serving.openai.requests import ChatRequest
from toolkit.serving.openai.responses import event
from toolkit.serving.openai.sampling import IGNORED
from toolkit.serving.openapi import LIMITS

PAGE = "https://chat.example.org"
COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
ASK = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def status(client, authorization=None, path=MODELS):
    headers = {} if authorization is None else {"authorization": authorization}
    return client.get(path, headers=headers).status_code


def test_a_key_in_any_spelling_of_the_scheme_and_any_encoding():
    client, _ = client_of(ToldEngine(), api_key=["clé secrète", "ключ", "plain"])
    with client:
        for scheme in ("Bearer", "bearer", "BEARER", "bEaReR "):
            assert status(client, f"{scheme} plain") == 200
        for key, encoding in (("clé secrète", "utf-8"), ("clé secrète", "latin-1"), ("ключ", "utf-8")):
            assert status(client, b"Bearer " + key.encode(encoding)) == 200
        for wrong in ("", "Bearer", "Bearer ", "plain", "Basic plain", "Bearerplain", "Bearer plai", b"Bearer \xff"):
            assert status(client, wrong) == status(client) == 401
        refused = client.post(COMPLETIONS, content=b"{")  # before the body is read
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/", "/health", "/ping", "/version", "/metrics", "/openapi.json"):
            assert status(client, path=path) == 200


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_refused(key):
    with pytest.raises(ToolkitError, match="api_key must be text that is not empty"):
        ApiKeys(["good", key])


def test_web_pages_that_are_allowed_and_others():
    client, _ = client_of(ToldEngine(), api_key="secret", cors=Cors((PAGE,), allow_credentials=True))
    with client:
        preflight = client.options(COMPLETIONS, headers={"origin": PAGE, **ASK})  # browsers send no key with it
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert preflight.headers["access-control-allow-headers"] == ASK["access-control-request-headers"]
        assert client.options(COMPLETIONS, headers={"origin": "https://evil.example", **ASK}).status_code == 400
        for headers, expected in (({"authorization": "Bearer secret"}, 200), ({}, 401)):
            response = client.get(MODELS, headers={"origin": PAGE, **headers})
            assert response.status_code == expected
            assert response.headers["access-control-allow-origin"] == PAGE  # pages can read the error too
            assert response.headers["access-control-allow-credentials"] == "true"
        stranger = client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers
    client, _ = client_of(ToldEngine())
    with client:
        assert "access-control-allow-origin" not in client.get("/health", headers={"origin": PAGE}).headers


@pytest.mark.parametrize("origin", ["chat.example.org", f"{PAGE}/", f"{PAGE}/chat", "", "https://"])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(ToolkitError, match="allowed_origins must be "):
        Cors((PAGE, origin))


def test_options_and_head_of_every_path():
    client, _ = client_of(ToldEngine(), max_model_len=64)
    with client:
        for path in ("/health", MODELS, "/v1/models/told", "/metrics", "/version", "/openapi.json"):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == get.headers["content-type"]
            if path != "/metrics":  # which counts the requests
                assert head.headers["content-length"] == get.headers["content-length"]
            allowed = client.options(path)
            assert (allowed.status_code, allowed.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
        assert client.options(COMPLETIONS).headers["allow"] == "OPTIONS, POST"
        assert client.options("/ping").headers["allow"] == "GET, HEAD, OPTIONS, POST"
        refused = client.get(COMPLETIONS)
        assert (refused.status_code, refused.headers["allow"]) == (405, "OPTIONS, POST")
        assert client.head(COMPLETIONS).status_code == 405
        assert client.options("/nowhere").status_code == client.head("/nowhere").status_code == 404


def test_a_model_of_several_names():
    client, _ = client_of(ToldEngine(), names=["told", "alias"])
    with client:
        assert [card["id"] for card in client.get(MODELS).json()["data"]] == ["told", "alias"]
        assert client.get(f"{MODELS}/alias").json()["id"] == "alias"
        for name in (None, "told", "alias"):
            assert client.post(COMPLETIONS, json={**PROMPT, "model": name}).json()["model"] == "told"
        refused = client.post(COMPLETIONS, json={**PROMPT, "model": "other"})
        assert refused.status_code == 404
        assert refused.json()["error"]["message"] == "'model' must be 'told' or 'alias', got 'other'."


def test_every_response_has_the_id_of_its_request():
    client, _ = client_of(ToldEngine())
    with client:
        assert client.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
        streamed = client.post(COMPLETIONS, json={**PROMPT, "stream": True}, headers={"x-request-id": "mine"})
        assert streamed.headers["x-request-id"] == "mine"
        fresh = [client.get("/nowhere", headers={"x-request-id": "x" * size}).headers for size in (0, 257)]
        assert len({one["x-request-id"] for one in fresh}) == 2


def test_behind_a_proxy_with_and_without_the_prefix():
    client, _ = client_of(ToldEngine(), root_path="/api")
    with client:
        for path in (MODELS, f"/api{MODELS}"):
            assert status(client, path=path) == 200
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/api"}]
        counted = client.get("/metrics").text
        assert f'toolkit:http_requests_total{{path="{MODELS}",status="200"}} 2' in counted


def test_names_of_objects_in_requests_are_those_of_the_document():
    names = [body.__name__ for protocol in PROTOCOLS for body in protocol.BODIES]
    assert {name for name in names if names.count(name) > 1} == set()  # pydantic would rename them


def test_small_routes():
    client, _ = client_of(ToldEngine())
    with client:
        assert client.get("/version").json() == {"version": toolkit.__version__}
        assert client.get("/ping").json() == client.post("/ping").json() == {"status": "ok"}
        assert client.get("/docs").status_code == 200
    client, _ = client_of(ToldEngine(), docs=False)
    with client:
        assert [status(client, path=path) for path in ("/docs", "/redoc", "/openapi.json")] == [404] * 3


@pytest.mark.parametrize("value", [True, "auto", {"a": [1]}, 3])
def test_fields_that_change_no_token_are_accepted(value):
    client, _ = client_of(ToldEngine())
    with client:
        for name in IGNORED:
            assert client.post(COMPLETIONS, json={**PROMPT, name: value}).status_code == 200


def test_the_docs_list_the_fields_that_are_ignored():
    page = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| accepted and not used |")]
    listed = [word.strip(" `|") for word in line.split("|")[2].split(",")]
    assert listed == [*IGNORED, "stream_options.include_obfuscation"]


def test_usage_in_every_chunk_counts_its_choice():
    client, _ = client_of(ToldEngine())
    asked = {**PROMPT, "prompt": [[1, 2, 3], [4]], "stream": True}
    with client:
        for continuous in (True, False):
            options = {"include_usage": True, "continuous_usage_stats": continuous}
            text = client.post(COMPLETIONS, json={**asked, "stream_options": options}).text
            chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            whole = {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
            assert chunks[-1]["usage"] == {**whole, "prompt_tokens_details": {"cached_tokens": 0}}
            seen = {0: [], 1: []}
            for chunk in chunks[:-1]:
                seen[chunk["choices"][0]["index"]].append(chunk["usage"])
            for index, prompt in ((0, 3), (1, 1)):
                given = {"prompt_tokens": prompt}
                counts = [{**given, "completion_tokens": n, "total_tokens": prompt + n} for n in (1, 2, 3)]
                assert seen[index] == (counts if continuous else [None] * 3)
        alone = {**asked, "stream_options": {"continuous_usage_stats": True}}  # as in vLLM: nothing without the other
        assert "usage" not in client.post(COMPLETIONS, json=alone).text


def test_bodies_that_are_not_json_as_they_are_say_so():
    client, _ = client_of(ToldEngine())
    with client:
        packed = client.post(COMPLETIONS, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
        assert packed.status_code == 415
        assert "must not be encoded, got the Content-Encoding 'gzip'." in packed.json()["error"]["message"]
        empty = client.post(COMPLETIONS)
        assert (empty.status_code, empty.json()["error"]["message"]) == (
            400, "The request body must be a JSON object, got none."
        )  # fmt: skip


def test_an_event_is_one_line_for_every_way_of_splitting_lines():
    text = "a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1de😀"
    sent = event({"text": text})
    assert sent.isascii()
    assert len(sent.splitlines()) == 2  # and the empty one that ends it
    assert json.loads(sent.removeprefix("data: "))["text"] == text


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_a_client_that_leaves_while_uploading_is_no_error(sent):
    """The application raises nothing, which a server would log with a traceback."""
    client, _ = client_of(ToldEngine())
    parts = [{"type": "http.request", "body": b"{", "more_body": True}] * sent

    async def receive():
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message):
        messages.append(message)

    messages = []
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b""}
    asyncio.run(client.app(scope, receive, send))
    assert messages[0]["status"] == 499
    with client:
        assert f'toolkit:http_requests_total{{path="{COMPLETIONS}",status="499"}} 1' in client.get("/metrics").text


def test_the_limits_in_the_openapi_document_are_those_of_sampling_params():
    for name, limit in LIMITS.items():
        field = "max_tokens" if name == "max_completion_tokens" else name
        for bound, beyond in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)):
            if bound in limit:
                if bound != "exclusiveMinimum":
                    SamplingParams(**{field: limit[bound]})
                with pytest.raises(ToolkitError, match=field):
                    SamplingParams(**{field: limit[bound] + beyond})


def test_the_openapi_document_describes_the_bodies():
    client, _ = client_of(ToldEngine(), names=["told", "alias"], max_model_len=64, vocab_size=99)
    with client:
        document = client.get("/openapi.json").json()
    components = document["components"]["schemas"]
    for path, body in ((COMPLETIONS, CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{body.__name__}"}
        assert {"200", "4XX", "5XX"} == set(operation["responses"])
        properties = components[body.__name__]["properties"]
        assert {*body.model_fields, *IGNORED} <= set(properties)
        assert properties["model"]["anyOf"] == [{"enum": ["told", "alias"]}, {"type": "null"}]
    kinds = components["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert [kind["type"] for kind in kinds] == ["string", "array", "array", "array"]
    assert kinds[2]["items"] == {"type": "integer", "minimum": 0, "maximum": 98}

    def references(part):
        if isinstance(part, dict):
            yield from ([part["$ref"]] if "$ref" in part else ())
            part = list(part.values())
        for inner in part if isinstance(part, list) else ():
            yield from references(inner)

    assert {reference.rpartition("/")[2] for reference in references(document)} <= set(components)
