"""Admin endpoints, limits per client, deadlines and the log of requests, on an engine that does as it is told."""

import asyncio
import json
import threading
import time

import pytest

from tests.helpers.told_engine import PROMPT, ToldEngine, client_of
from toolkit.cli import main
from toolkit.serving.access import AdminAccess
from toolkit.serving.request_log import JsonLog, LogRequests
from toolkit.serving.running import RunningRequests

OPEN = AdminAccess(enabled=True)
ADMIN_PATHS = [
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("GET", "/is_paused"),
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/flush_cache"),
    ("POST", "/abort_requests"),
]


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


class Sent(threading.Thread):
    """A request on a thread; ``response`` when it has ended."""

    def __init__(self, client, body, **headers):
        super().__init__(daemon=True)
        self.client, self.body, self.headers, self.response = client, body, headers, None
        self.start()

    def run(self):
        self.response = self.client.post("/v1/completions", json=self.body, headers=self.headers)

    def ended(self):
        self.join(10)
        assert self.response is not None
        return self.response


@pytest.fixture
def told():
    return ToldEngine()


def test_admin_endpoints_are_off_and_say_how_they_are_turned_on(told):
    client, _ = client_of(told)
    with client:
        for method, path in ADMIN_PATHS:
            response = client.request(method, path)
            assert response.status_code == 403, path
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "admin_endpoints_off")
            assert "--admin-api-key" in error["message"]
            assert "--enable-admin-endpoints" in error["message"]
        assert client.post("/v1/completions", json=PROMPT).status_code == 200


def test_an_admin_key_alone_opens_them(told):
    client, _ = client_of(told, api_key="user", admin=AdminAccess(("chief", "deputy")))
    with client:
        for key, status in (("user", 401), ("", 401), ("chief", 200), ("deputy", 200)):
            assert client.get("/is_paused", headers={"authorization": f"Bearer {key}"}).status_code == status
        assert client.get("/v1/models", headers={"authorization": "Bearer chief"}).status_code == 401


def test_without_an_admin_key_the_server_s_key_is_asked_for_and_web_pages_are_kept_out(told):
    client, _ = client_of(told, api_key="user", admin=OPEN)
    with client:
        assert client.get("/is_paused").status_code == 401
        key = {"authorization": "Bearer user"}
        assert client.get("/is_paused", headers=key).json() == {"is_paused": False}
        from_page = client.post("/pause", headers={**key, "origin": "https://page.example.org"})
        assert from_page.status_code == 403
        assert "web pages" in from_page.json()["error"]["message"]


def test_the_command_refuses_admin_endpoints_that_are_open_to_others(chat_model, capsys):
    assert main(["serve", str(chat_model), "--host", "0.0.0.0", "--port", "0", "--enable-admin-endpoints"]) == 2
    assert "--admin-api-key must be given with --enable-admin-endpoints on --host '0.0.0.0'" in capsys.readouterr().err
    assert main(["serve", str(chat_model), "--max-requests-per-client", "0"]) == 2
    assert "--max-requests-per-client must be >= 1, got 0." in capsys.readouterr().err
    assert main(["serve", str(chat_model), "--log-requests", "/nowhere/at/all"]) == 2
    assert "--log-requests must be a file that can be written, got '/nowhere/at/all'" in capsys.readouterr().err


def test_requests_wait_while_paused_and_finish_after_resume(told):
    client, engine = client_of(told, admin=OPEN)
    with client:
        assert client.post("/pause", params={"mode": "keep"}).json() == {"status": "paused"}
        assert client.post("/pause", params={"mode": "keep"}).status_code == 200
        assert client.get("/is_paused").json() == {"is_paused": True}
        sent = Sent(client, PROMPT)
        until(lambda: client.get("/load").json() == {"server_load": 1})
        time.sleep(0.05)
        assert told.steps == 0
        assert sent.response is None
        with engine.pause():  # a writer of weights beside it
            pass
        assert engine.is_paused
        assert client.post("/resume").json() == {"status": "resumed"}
        assert sent.ended().json()["choices"][0]["text"] == "xxx"
        assert client.get("/is_paused").json() == {"is_paused": False}
        assert told.forgotten == []


@pytest.fixture
def waiting_pause(monkeypatch):
    """A pause that waits for running requests, and has begun to: its thread and its responses."""
    begun, close = threading.Event(), RunningRequests.close

    def noted(running):
        close(running)
        begun.set()

    monkeypatch.setattr(RunningRequests, "close", noted)

    def begin(client):
        responses = []
        pausing = threading.Thread(target=lambda: responses.append(client.post("/pause", params={"mode": "wait"})))
        pausing.start()
        assert begun.wait(10)
        return pausing, responses

    return begin


def test_a_pause_that_waits_lets_running_requests_finish_and_new_ones_wait(told, waiting_pause):
    client, engine = client_of(told, admin=OPEN)
    with client:
        told.held.clear()
        running = Sent(client, PROMPT)
        until(lambda: told.live)
        pausing, responses = waiting_pause(client)
        late = Sent(client, PROMPT)
        time.sleep(0.05)
        assert not responses
        assert len(told.live) == 1
        told.held.set()
        pausing.join(10)
        assert responses[0].json() == {"status": "paused"}
        assert running.ended().status_code == 200
        assert told.forgotten == ["prefixes", "pictures"]
        steps = told.steps
        assert late.response is None
        assert client.post("/pause", params={"mode": "wait"}).status_code == 409  # the late one would never finish
        client.post("/resume")
        assert late.ended().status_code == 200
        assert told.steps == steps + PROMPT["max_tokens"]
        assert not engine.is_paused


def test_resume_ends_a_pause_that_still_waits(told, waiting_pause):
    client, _ = client_of(told, admin=OPEN)
    with client:
        told.held.clear()
        running = Sent(client, PROMPT)
        until(lambda: told.live)
        pausing, responses = waiting_pause(client)
        assert client.post("/resume").status_code == 200
        pausing.join(10)
        assert responses[0].status_code == 409
        told.held.set()
        assert running.ended().status_code == 200
        assert client.post("/v1/completions", json=PROMPT).status_code == 200


def test_a_pause_that_aborts_ends_running_requests_at_once(told):
    client, _ = client_of(told, admin=OPEN)
    with client:
        client.post("/pause", params={"mode": "keep"})
        sent = Sent(client, PROMPT)
        until(lambda: client.get("/load").json()["server_load"] == 1)
        assert client.post("/pause").json() == {"status": "paused"}
        ended = sent.ended()
        assert (ended.status_code, ended.json()["error"]["code"]) == (503, "aborted")
        assert client.get("/load").json() == {"server_load": 0}  # without a step
        assert told.steps == 0


def test_requests_are_aborted_by_either_of_their_ids(told):
    client, _ = client_of(told, admin=OPEN)
    with client:
        client.post("/pause", params={"mode": "keep"})
        mine, other = (
            Sent(client, PROMPT, **{"x-request-id": "mine"}),
            Sent(client, PROMPT, **{"x-request-id": "other"}),
        )
        until(lambda: client.get("/load").json()["server_load"] == 2)
        assert client.post("/abort_requests", json={"request_ids": ["mine", "nobody"]}).json() == {"num_aborted": 1}
        ended = mine.ended()
        assert (ended.status_code, ended.json()["error"]["message"]) == (499, "The request was aborted.")
        assert other.response is None
        assert client.post("/abort_requests", json={"abort_all": True}).json() == {"num_aborted": 1}
        assert other.ended().status_code == 499
        assert client.post("/abort_requests", json={"abort_all": True}).json() == {"num_aborted": 0}
        for body in ({}, {"request_ids": ["a"], "abort_all": True}):
            assert "and not both" in client.post("/abort_requests", json=body).json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/pause?mode=stop", "'mode' must be one of 'abort', 'wait' or 'keep', got 'stop'."),
        ("/sleep?level=3", "'level' must be <= 2, got '3'."),
        (
            "/wake_up?tags=kv_cache,brain",
            "'tags[1]' must be one of 'weights', 'kv_cache' or 'scheduling', got 'brain'.",
        ),
        ("/pause?mood=good", "'mood'"),
    ],
)
def test_parameters_behind_the_path_are_checked(told, path, message):
    client, engine = client_of(told, admin=OPEN)
    with client:
        response = client.post(path)
        assert response.status_code == 400
        assert message.rstrip(".") in response.json()["error"]["message"]
        assert not engine.is_paused


def test_a_client_has_a_bounded_number_of_unfinished_sequences(told):
    keys = ["one", "two"]
    client, _ = client_of(told, api_key=keys, admin=AdminAccess(("chief",)), max_requests_per_client=2)
    one, two = ({"authorization": f"Bearer {key}"} for key in keys)
    with client:
        chief = {"authorization": "Bearer chief"}
        client.post("/pause?mode=keep", headers=chief)
        first = Sent(client, {**PROMPT, "prompt": [[1, 2], [3]]}, **one)
        until(lambda: len(told.live) == 2)
        refused = client.post("/v1/completions", json=PROMPT, headers=one)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        error = refused.json()["error"]
        assert error["type"] == "rate_limit_error"
        assert error["message"].startswith("This client must have <= 2 unfinished sequences, got 3")
        disguised = {"x-api-key": "one", "authorization": "Bearer another"}  # what else it sends makes it nobody else
        assert client.post("/v1/completions", json=PROMPT, headers=disguised).status_code == 429
        others = Sent(client, PROMPT, **two)
        until(lambda: len(told.live) == 3)
        client.post("/resume", headers=chief)
        assert first.ended().status_code == others.ended().status_code == 200
        assert client.post("/v1/completions", json=PROMPT, headers=one).status_code == 200
        too_many = client.post("/v1/completions", json={**PROMPT, "n": 3}, headers=one)
        assert (too_many.status_code, too_many.json()["error"]["type"]) == (400, "invalid_request_error")


def test_without_keys_a_client_is_an_address(told):
    client, _ = client_of(told, max_requests_per_client=1)
    with client:
        told.held.clear()
        first = Sent(client, PROMPT)
        until(lambda: told.live)
        header = {"authorization": "Bearer another"}
        assert client.post("/v1/completions", json=PROMPT, headers=header).status_code == 429
        told.held.set()
        assert first.ended().status_code == 200


LONG = {**PROMPT, "max_tokens": 10**6}


@pytest.mark.parametrize("held_by", ["its length", "a pause", "a drain"])
def test_a_request_ends_at_its_deadline(told, held_by, waiting_pause):
    client, _ = client_of(told, admin=OPEN)
    with client:
        if held_by == "a pause":
            client.post("/pause", params={"mode": "keep"})
        if held_by == "a drain":
            running = Sent(client, LONG)
            until(lambda: told.live)
            pausing, _ = waiting_pause(client)
        response = client.post("/v1/completions", json=LONG, headers={"x-request-timeout": "0.1"})
        assert response.status_code == 504
        error = response.json()["error"]
        assert error["code"] == "timeout"
        assert error["message"] == "The request took longer than its x-request-timeout of 0.1 seconds."
        if held_by == "a drain":
            client.post("/abort_requests", json={"abort_all": True})
            assert running.ended().status_code == 499
            pausing.join(10)
        until(lambda: not told.live)


def test_a_stream_ends_at_its_deadline_with_an_error(told):
    client, _ = client_of(told)
    with client:
        headers = {"x-request-timeout": "0.1"}
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=headers) as response:
            events = [line for line in response.iter_lines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "1e9"])
def test_a_deadline_is_a_number_of_seconds(told, given):
    client, _ = client_of(told)
    with client:
        response = client.post("/v1/completions", json=PROMPT, headers={"x-request-timeout": given})
        assert response.status_code == 400
        expected = f"x-request-timeout must be > 0 and <= 86400 seconds, got '{given}'."
        assert response.json()["error"]["message"] == expected


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_request_is_one_line_of_the_log_without_its_prompt(told, tmp_path):
    path = tmp_path / "requests.jsonl"
    client, _ = client_of(told, log=JsonLog(str(path)), names=("first", "second"))
    with client:
        client.post("/v1/completions", json={**PROMPT, "model": "second", "n": 1}, headers={"x-request-id": "r1"})
        client.post("/v1/completions", json={**PROMPT, "prompt": [[1, 2], [3]], "stream": True})
        client.post("/v1/completions", json={"prompt": "a secret", "mood": 1})
        client.get("/health")
        client.get("/metrics")
    whole, streamed, refused = lines_of(path)
    assert (whole["id"], whole["method"], whole["path"], whole["status"]) == ("r1", "POST", "/v1/completions", 200)
    assert (whole["model"], whole["stream"], whole["client"]) == ("first", False, "testclient")
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["finish_reasons"]) == (3, 3, ["length"])
    assert 0 < whole["ttft_s"] <= whole["latency_s"] < 60
    assert (streamed["stream"], streamed["prompt_tokens"], streamed["completion_tokens"]) == (True, 3, 6)
    assert streamed["finish_reasons"] == ["length", "length"]
    assert (refused["status"], refused.get("model")) == (400, None)
    assert "secret" not in path.read_text()
    assert "body" not in whole


def test_the_line_is_there_before_the_end_of_the_response(tmp_path):
    path, seen = tmp_path / "requests.jsonl", []
    parts = [{"type": "http.response.start", "status": 200, "headers": []},
             {"type": "http.response.body", "body": b"a", "more_body": True},
             {"type": "http.response.body", "body": b""}]  # fmt: skip

    async def app(scope, receive, send):
        for part in parts:
            await send(part)

    async def send(message):
        seen.append(len(path.read_text().splitlines()) if path.exists() else 0)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "client": None}
    asyncio.run(LogRequests(app, JsonLog(str(path)), by_key=False)(scope, None, send))
    assert seen == [0, 0, 1]
    assert [line["status"] for line in lines_of(path)] == [200]


def test_prompts_are_logged_where_that_is_asked_for(told, tmp_path):
    path = tmp_path / "requests.jsonl"
    client, _ = client_of(told, log=JsonLog(str(path), prompts=True))
    with client:
        client.post("/v1/completions", json=PROMPT)
        client.post("/v1/completions", content=b"{no json")
        path.rename(tmp_path / "requests.1")  # logrotate
        client.post("/v1/completions", json=PROMPT)
    assert [line["body"] for line in lines_of(tmp_path / "requests.1")] == [PROMPT, "{no json"]
    assert [line["body"] for line in lines_of(path)] == [PROMPT]
