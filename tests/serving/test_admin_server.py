"""A real server process that is paused, put to sleep and woken while it generates."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from tests.helpers.server_process import serving

NUM_REQUESTS, MAX_TOKENS = 12, 48


@pytest.fixture(scope="module")
def server(chat_model, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "requests.jsonl"
    options = (
        "--port",
        "0",
        "--enable-admin-endpoints",
        "--max-num-seqs",
        "4",
        "--log-requests",
        str(log),
        "--grace",
        "1",
    )
    with serving(chat_model, *options) as one, httpx.Client(base_url=one.url, timeout=60) as http:
        yield SimpleNamespace(http=http, log=log, process=one.process)


def asked(at, **fields):
    """A request whose tokens are a function of its number."""
    prompt = [1 + (at * 7 + i) % 250 for i in range(5 + at)]
    sampling = {"temperature": 1.0, "seed": at, "max_tokens": MAX_TOKENS, "logprobs": 0, "ignore_eos": True}
    return {"prompt": prompt, **sampling, **fields}


def generated(http, at):
    choice = http.post("/v1/completions", json=asked(at)).raise_for_status().json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.fixture(scope="module")
def undisturbed(server):
    return [generated(server.http, at) for at in range(NUM_REQUESTS)]


@pytest.mark.parametrize(
    ("stop", "go_on"),
    [("/pause?mode=keep", "/resume"), ("/sleep", "/wake_up"), ("/sleep?level=2&mode=keep", "/wake_up?tags=kv_cache")],
)
def test_nothing_is_lost_while_it_is_stopped_and_continued(server, undisturbed, stop, go_on):
    done = threading.Event()
    stops = 0

    def disturb():
        nonlocal stops
        while not done.is_set():
            server.http.post(stop).raise_for_status()
            time.sleep(0.005)
            server.http.post(go_on).raise_for_status()
            stops += 1
            time.sleep(0.01)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            found = list(pool.map(lambda at: generated(server.http, at), range(NUM_REQUESTS)))
    finally:
        done.set()
        disturbing.join()
    assert stops > 3
    assert found == undisturbed
    assert server.http.get("/load").json() == {"server_load": 0}


def test_a_sleeping_server_holds_no_state_and_says_so(server):
    def used():
        lines = server.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("toolkit:num_cached_blocks "))

    generated(server.http, 11)
    assert used() > 0
    assert server.http.post("/sleep", params={"level": 1}).json() == {"status": "sleeping"}
    assert server.http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert used() == 0
    assert server.http.post("/wake_up", params={"tags": "weights"}).json() == {"status": "sleeping"}
    assert server.http.post("/wake_up").json() == {"status": "awake"}
    assert server.http.get("/is_sleeping").json() == {"is_sleeping": False}


def test_a_stream_that_is_frozen_continues_where_it_was(server, undisturbed):
    body = asked(3, stream=True)
    text = ""
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(8):
            text += _text(next(lines))
        server.http.post("/pause", params={"mode": "keep"}).raise_for_status()
        server.http.post("/reset_prefix_cache").raise_for_status()
        assert server.http.get("/is_paused").json() == {"is_paused": True}
        server.http.post("/resume").raise_for_status()
        text += "".join(map(_text, lines))
    assert text == undisturbed[3][0]


def _text(line):
    if not line or line.endswith("[DONE]"):
        return ""
    return json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def test_the_prefix_cache_is_forgotten_on_request(server):
    def hits():
        lines = server.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("toolkit:prefix_cache_hits_total "))

    long = {"prompt": list(range(1, 200)), "max_tokens": 1}
    server.http.post("/v1/completions", json=long)
    before = hits()
    server.http.post("/v1/completions", json=long)
    assert hits() > before
    for path in ("/reset_prefix_cache", "/flush_cache"):
        assert server.http.post(path).json() == {"success": True}
        before = hits()
        server.http.post("/v1/completions", json=long)
        assert hits() == before


def test_what_no_file_system_takes_as_a_path_is_the_request_s_error(server):
    for path in ("", "/tmp/a\0b", f"/tmp/{'x' * 300}", f"/{'y' * 300}/z"):
        bodies = {
            "/update_weights": {"weight_dir": path},
            "/export": {"path": path or "/etc/passwd"},
            "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": path},
            "/load_lora_adapter": {"lora_name": "a", "lora_path": path},
        }
        for endpoint, body in bodies.items():
            refused = server.http.post(endpoint, json=body)
            assert refused.status_code in (400, 404), (endpoint, path, refused.text)
            assert refused.json()["error"]["param"] == list(body)[-1]


def test_the_log_has_a_line_for_every_request(server, undisturbed):
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    ours = [line for line in lines if line.get("completion_tokens") == MAX_TOKENS]
    assert len(ours) >= NUM_REQUESTS
    assert all(line["finish_reasons"] == ["length"] and line["ttft_s"] < line["latency_s"] for line in ours)


@pytest.mark.parametrize(("stop", "go_on"), [("/pause?mode=keep", "/resume"), ("/sleep", "/wake_up")])
def test_a_request_runs_out_of_time_while_the_server_is_stopped(server, stop, go_on):
    server.http.post(stop).raise_for_status()
    try:
        headers = {"x-request-timeout": "0.2"}
        assert server.http.post("/v1/completions", json=asked(0), headers=headers).status_code == 504
        assert server.http.get("/load").json() == {"server_load": 0}
    finally:
        server.http.post(go_on).raise_for_status()


# The last test of the module: it ends the module's server.
def test_a_paused_server_ends_by_itself_and_tells_those_who_wait(server):
    server.http.post("/pause?mode=keep").raise_for_status()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(server.http.post, "/v1/completions", json=asked(at)) for at in range(2)]
        while server.http.get("/load").json()["server_load"] < 2:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        for one in waiting:
            assert one.result(30).status_code == 503
            assert "shutting down" in one.result().json()["error"]["message"]
    assert server.process.wait(30) == 0
