"""A path that is not there is refused with the path that the client may have meant."""

import pytest

from tests.helpers.told_engine import ToldEngine, client_of

MEANT = {
    "/chat/completions": "/v1/chat/completions",
    "/v1/v1/completions": "/v1/completions",
    "/v1/v1/messages": "/v1/messages",
    "/v1/api/chat": "/api/chat",
    "/v1//chat/completions": "/v1/chat/completions",
    "/chat//completions": "/v1/chat/completions",
    "/completion": "/v1/completions",
    "/generate_stream": "/v1/completions",
    "/invocations": "/v1/chat/completions",
    "/api/embeddings": "/api/embed",
}


@pytest.fixture(scope="module")
def client():
    with client_of(ToldEngine())[0] as client:
        yield client


@pytest.mark.parametrize(("path", "meant"), MEANT.items())
def test_the_path_that_was_meant_is_named_and_is_there(client, path, meant):
    response = client.post(path, json={})
    assert response.status_code == 404
    assert f"There is no POST {path}; use {meant}." in response.text
    assert client.post(meant, json={}).status_code != 404


def test_a_path_that_no_other_one_stands_for_is_refused_as_it_is(client):
    assert client.post("/v1/nothing", json={}).json()["error"]["message"] == "There is no POST /v1/nothing."
    assert client.post("/models", json={}).json()["error"]["message"] == "There is no POST /models."
    assert client.get("/models").json()["error"]["message"] == "There is no GET /models; use /v1/models."
