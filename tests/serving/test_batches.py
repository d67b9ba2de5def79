"""Batches by the ``openai`` client on a real server process, and by ``toolkit batch``: as single requests would be."""

import io
import json
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest

from tests.helpers.provider_specs import check
from tests.helpers.server_process import serving
from tests.helpers.told_engine import ToldEngine, client_of
from toolkit.cli import main
from toolkit.engine.params import SamplingParams
from toolkit.serving.batches import lines, schemas
from toolkit.serving.batches.files import Files
from toolkit.serving.errors import RequestError
from toolkit.testing.models import random_model

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
OPTIONS = ("--port", "0", "--grace", "3", "--max-num-seqs", "8", "--max-queue", "64")


def line(name, body, url=COMPLETIONS, **fields):
    return {"custom_id": name, "method": "POST", "url": url, "body": body, **fields}


def text_of(*found):
    return "".join(json.dumps(one) + "\n" for one in found)


def asked(count, url=COMPLETIONS, **fields):
    """Requests with seeds, so that a response is a function of its request."""
    bodies = []
    for at in range(count):
        about = {"prompt": f"fox {at}"} if url == COMPLETIONS else {"messages": [{"role": "user", "content": f"{at}"}]}
        bodies.append({"model": "tiny", "max_tokens": 5, "seed": at, "logprobs": None, **about, **fields})
    return bodies


@pytest.fixture(scope="module")
def server(chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    with serving(chat_model, *OPTIONS, "--api-key", "secret", "--batch-folder", str(folder)) as one:
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="secret", max_retries=0, timeout=60)
        headers = {"authorization": "Bearer secret"}
        with httpx.Client(base_url=one.url, timeout=60, headers=headers) as http:
            yield SimpleNamespace(url=one.url, client=client, http=http, process=one.process, folder=folder)


def upload(client, text):
    return client.files.create(file=("in.jsonl", io.BytesIO(text.encode())), purpose="batch")


def ended(client, identity, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        batch = client.batches.retrieve(identity)
        if batch.status in schemas.ENDED:
            return batch
        time.sleep(0.05)
    raise AssertionError(batch)


def started(client, text, endpoint=COMPLETIONS, **fields):
    file = upload(client, text)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def content(client, identity):
    return [json.loads(one) for one in client.files.content(identity).text.splitlines()]


def without_names(body):
    return {name: value for name, value in body.items() if name not in ("id", "created", "usage")}


@pytest.mark.parametrize("url", [COMPLETIONS, CHATS])
def test_results_are_those_of_single_requests(server, url):
    client, bodies = server.client, asked(20, url)
    batch = started(client, text_of(*(line(f"r{at}", body, url) for at, body in enumerate(bodies))), url,
                    metadata={"of": "a test"})  # fmt: skip
    done = ended(client, batch.id)
    assert (done.status, done.error_file_id, done.metadata) == ("completed", None, {"of": "a test"})
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (20, 20, 0)
    found = {one["custom_id"]: one for one in content(client, done.output_file_id)}
    assert set(found) == {f"r{at}" for at in range(20)}
    for at, body in enumerate(bodies):
        one = found[f"r{at}"]
        assert set(one) == {"id", "custom_id", "response", "error"}
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        single = server.http.post(url, json=body).json()
        assert without_names(one["response"]["body"]) == without_names(single)
    about = client.files.retrieve(done.output_file_id)
    assert (about.purpose, about.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert about.bytes == len(client.files.content(done.output_file_id).content)


def test_responses_in_a_batch_and_files_that_expire(server):
    client = server.client
    after = {"anchor": "created_at", "seconds": 3600}
    bodies = [{"model": "tiny", "input": f"fox {at}", "max_output_tokens": 4, "seed": at} for at in range(3)]
    text = text_of(*(line(f"r{at}", body, "/v1/responses") for at, body in enumerate(bodies)))
    file = client.files.create(file=("in.jsonl", io.BytesIO(text.encode())), purpose="batch", expires_after=after)
    assert file.expires_at == file.created_at + 3600
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", output_expires_after=after
    )
    done = ended(client, batch.id)
    assert (done.status, done.request_counts.completed) == ("completed", 3)
    assert "output_lifetime" not in done.to_dict()
    assert "output_lifetime" not in server.http.get("/v1/batches").text
    output = client.files.retrieve(done.output_file_id)
    assert output.expires_at == output.created_at + 3600
    for one in content(client, done.output_file_id):
        single = server.http.post("/v1/responses", json=bodies[int(one["custom_id"][1:])]).json()
        assert one["response"]["body"]["output"][0]["content"] == single["output"][0]["content"]
    unending = upload(client, text)
    assert unending.expires_at is None
    for fields, words in (
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "must be 'created_at', got 'now'."),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, "must be an integer >= 3600 and <= "),
        ({"expires_after[anchor]": "created_at"}, "must be an integer >= 3600 and <= 2592000, got None."),
    ):
        data = {"purpose": "batch", **fields}
        wrong = server.http.post("/v1/files", data=data, files={"file": ("a.jsonl", b"{}")})
        assert (wrong.status_code, words in wrong.json()["error"]["message"]) == (400, True), wrong.text
    body = {"input_file_id": unending.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    wrong = server.http.post("/v1/batches", json={**body, "output_expires_after": {**after, "seconds": 60}}).json()
    assert wrong["error"]["param"] == "output_expires_after.seconds"


def test_a_file_that_has_expired_is_deleted_unless_it_is_read(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("toolkit.serving.batches.files.time.time", lambda: now[0])
    read: set[str] = set()
    files = Files(tmp_path, read.__contains__)
    found = {}
    for lifetime in (None, 10, 20):
        with files.adding("a.jsonl", "batch", lifetime) as (identity, out):
            out.write(b"x")
        found[lifetime] = identity
    now[0] = 1010.0
    assert [one.id for one in files.records] == [found[None], found[20]]
    assert not list(tmp_path.glob(f"{found[10]}*"))
    read.add(found[20])
    now[0] = 1030.0
    assert files.path(found[20]).read_bytes() == b"x"
    read.clear()
    with pytest.raises(RequestError, match="There is no file"):
        files.path(found[20])
    assert [one.id for one in Files(tmp_path).records] == [found[None]]


def test_errors_have_a_file_of_their_own(server):
    good, bad, stranger = asked(1)[0], {"prompt": "a", "top_p": 2}, {"prompt": "a", "model": "other"}
    text = text_of(line("good", good), line("bad", bad), line("stranger", stranger))
    done = ended(server.client, started(server.client, text).id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 2)
    assert [one["custom_id"] for one in content(server.client, done.output_file_id)] == ["good"]
    errors = {one["custom_id"]: one["response"] for one in content(server.client, done.error_file_id)}
    assert {name: one["status_code"] for name, one in errors.items()} == {"bad": 400, "stranger": 404}
    assert errors["bad"]["body"] == server.http.post(COMPLETIONS, json=bad).json()
    assert all(one["request_id"] for one in errors.values())


BAD_FILES = [
    ("", None, "empty_file"),
    ("{\n", 1, "invalid_json_line"),
    ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"top_p": NaN}}', 1, "invalid_json_line"),
    ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"n": 1e999}}', 1, "invalid_json_line"),
    ("\n\n[1]\n", 3, "invalid_json_line"),
    (text_of(line("a", {}), line("a", {})), 2, "duplicate_custom_id"),
    (text_of(line("a", {}, CHATS)), 1, "mismatched_url"),
    (text_of(line("a", {}, "/v1/models")), 1, "mismatched_url"),
    (text_of(line("", {})), 1, "invalid_request"),
    (text_of({**line("a", {}), "method": "GET"}), 1, "invalid_request"),
    (text_of(line("a", [])), 1, "invalid_request"),
    (text_of(line("a", {"stream": True})), 1, "invalid_request"),
    (text_of(line("a", {}, more=1)), 1, "invalid_request"),
]


@pytest.mark.parametrize(("text", "number", "code"), BAD_FILES, ids=lambda value: None)
def test_a_file_that_is_no_batch_fails_it_with_the_line(server, text, number, code):
    failed = ended(server.client, started(server.client, text).id)
    assert (failed.status, failed.output_file_id, failed.error_file_id) == ("failed", None, None)
    (error,) = failed.errors.data
    assert (error.line, error.code) == (number, code)
    assert error.message.endswith(".")


def test_a_batch_that_is_cancelled_keeps_what_it_has(server):
    long = asked(40, max_tokens=2000, ignore_eos=True)
    text = text_of(line("short", asked(1)[0]), *(line(f"r{at}", body) for at, body in enumerate(long)))
    batch = started(server.client, text)
    end = time.monotonic() + 60
    while not server.client.batches.retrieve(batch.id).request_counts.completed and time.monotonic() < end:
        time.sleep(0.02)
    assert server.client.batches.cancel(batch.id).status == "cancelling"
    done = ended(server.client, batch.id)
    assert done.status == "cancelled"
    assert done.cancelling_at <= done.cancelled_at
    assert "short" in [one["custom_id"] for one in content(server.client, done.output_file_id)]
    left = content(server.client, done.error_file_id)
    assert {one["error"]["code"] for one in left} == {"batch_cancelled"}
    assert done.request_counts.completed + len(left) == 41
    with pytest.raises(openai.ConflictError, match="A batch that is cancelled must not be cancelled"):
        server.client.batches.cancel(batch.id)
    deadline = time.monotonic() + 10
    while "toolkit:num_requests_running 0" not in server.http.get("/metrics").text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "toolkit:num_requests_running 0" in server.http.get("/metrics").text


def test_who_waits_for_a_response_goes_first(server):
    """A batch that takes long does not hold up a request."""
    batch = started(
        server.client, text_of(*(line(f"r{at}", b) for at, b in enumerate(asked(60, max_tokens=400, ignore_eos=True))))
    )
    response = server.client.completions.create(model="tiny", prompt="now", max_tokens=2)
    assert response.usage.completion_tokens >= 1
    now = server.client.batches.retrieve(batch.id)
    assert now.status in ("validating", "in_progress")
    server.client.batches.cancel(batch.id)
    ended(server.client, batch.id)


def test_files_and_batches_are_listed_and_deleted(server):
    client = server.client
    files = [upload(client, text_of(line("a", asked(1)[0]))) for _ in range(3)]
    first = client.files.list(limit=2, purpose="batch")
    assert [one.id for one in first.data] == [files[2].id, files[1].id]
    assert first.has_more
    assert next(one.id for one in first.get_next_page().data) == files[0].id
    assert client.files.list(order="asc", limit=1).data[0].id != files[2].id
    assert client.files.delete(files[1].id).deleted
    with pytest.raises(openai.NotFoundError, match="There is no file"):
        client.files.retrieve(files[1].id)
    batch = ended(client, started(client, text_of(line("a", asked(1)[0]))).id)
    listed = client.batches.list(limit=1)
    assert (listed.data[0].id, listed.has_more) == (batch.id, True)
    with pytest.raises(openai.BadRequestError, match="must be a file with the purpose 'batch'"):
        client.batches.create(input_file_id=batch.output_file_id, endpoint=COMPLETIONS, completion_window="24h")
    assert sorted(path.name for path in (server.folder / "files").glob(".*")) == []


def test_wrong_requests_are_one_sentence(server):
    http = server.http
    wrong = [
        (
            "/v1/files",
            {"files": {"file": b"x"}, "data": {"purpose": "fine-tune"}},
            "'purpose' must be 'batch', got 'fine-tune'.",
        ),
        (
            "/v1/files",
            {"files": {"file": b"x"}, "data": {"purpose": "batch", "x": "1"}},
            "Unknown field 'x'; a file has 'file', 'purpose' and 'expires_after'.",
        ),
        ("/v1/files", {"data": {"purpose": "batch", "file": "x"}}, "'file' must be a file."),
        (
            "/v1/files",
            {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
            "must be multipart/form-data",
        ),
        (
            "/v1/batches",
            {"json": {"input_file_id": "../x", "endpoint": COMPLETIONS, "completion_window": "24h"}},
            "There is no file '../x'.",
        ),
        (
            "/v1/batches",
            {"json": {"input_file_id": "x", "endpoint": "/v1/models", "completion_window": "24h"}},
            "'endpoint' must be one of",
        ),
        (
            "/v1/batches",
            {"json": {"input_file_id": "x", "endpoint": COMPLETIONS, "completion_window": "1h"}},
            "'completion_window' must be",
        ),
    ]
    for path, how, message in wrong:
        error = http.post(path, **how)
        assert error.status_code in (400, 404), error.text
        assert message in error.json()["error"]["message"]
    missing = http.get("/v1/batches", params={"after": "nowhere"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "after")
    for path in ("/v1/files/nowhere", "/v1/files/nowhere/content", "/v1/batches/nowhere"):
        assert http.get(path).status_code == 404
    for limit in ("0", "²", "000000001" + "9" * 5000):
        for path in ("/v1/files", "/v1/batches"):
            refused = http.get(path, params={"limit": limit})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limit")
    assert httpx.get(f"{server.url}/v1/files").status_code == 401


@pytest.mark.sweep
def test_a_server_that_starts_again_has_its_files_and_begins_unfinished_batches_again(chat_model, tmp_path):
    options = (*OPTIONS, "--batch-folder", str(tmp_path / "kept"))
    bodies = asked(30, max_tokens=400, ignore_eos=True)
    with serving(chat_model, *options) as one:
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="-", max_retries=0)
        first = ended(client, started(client, text_of(line("a", asked(1)[0]))).id)
        batch = started(client, text_of(*(line(f"r{at}", body) for at, body in enumerate(bodies))))
        end = time.monotonic() + 60
        while client.batches.retrieve(batch.id).status == "validating" and time.monotonic() < end:
            time.sleep(0.01)
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(30) == 0, one.errors
    left = json.loads((tmp_path / "kept" / "batches" / f"{batch.id}.json").read_text())
    assert (left["status"], left["output_file_id"]) == ("in_progress", None)
    with serving(chat_model, *options) as one:
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="-", max_retries=0)
        assert client.batches.retrieve(first.id) == first
        assert len(content(client, first.output_file_id)) == 1
        done = ended(client, batch.id)
        assert (done.status, done.request_counts.completed) == ("completed", 30)
        assert len(content(client, done.output_file_id)) == 30


def test_a_batch_asks_at_the_lowest_priority_and_so_many_at_a_time():
    engine = ToldEngine()
    engine.held.clear()
    client, _ = client_of(engine, max_queued_seqs=6)
    seen = []
    submit = engine.submit_batch

    def noting(prompts, params):
        seen.append(params[0].priority)
        return submit(prompts, params)

    engine.submit_batch = noting
    with client:
        check("openai", "ListFilesResponse", client.get("/v1/files").json())  # empty ones too
        check("openai", "ListBatchesResponse", client.get("/v1/batches").json())
        files = {
            "file": (
                "a",
                text_of(*(line(str(at), {"prompt": [1], "max_tokens": 2, "priority": -7}) for at in range(9))),
            )
        }
        file = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()
        asked_for = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
        batch = client.post("/v1/batches", json=asked_for).json()
        schemas.BatchObject.model_validate(batch)
        check("openai", "OpenAIFile", file)
        check("openai", "ListFilesResponse", client.get("/v1/files").json())
        check("openai", "Batch", batch)
        end = time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        assert seen == [2**63 - 1] * 3  # half of what may wait
        engine.held.set()
        while client.get(f"/v1/batches/{batch['id']}").json()["status"] != "completed" and time.monotonic() < end:
            time.sleep(0.01)
        assert len(seen) == 9
        file = client.post("/v1/files", files={"file": ("a", "no line")}, data={"purpose": "batch"}).json()
        failed = client.post("/v1/batches", json={**asked_for, "input_file_id": file["id"]}).json()
        while client.get(f"/v1/batches/{failed['id']}").json()["status"] != "failed" and time.monotonic() < end:
            time.sleep(0.01)
        listed = client.get("/v1/batches").json()
        check("openai", "ListBatchesResponse", listed)
        assert [one["status"] for one in listed["data"]] == ["failed", "completed"]
        for one in listed["data"]:
            assert client.get(f"/v1/batches/{one['id']}").json() == one
            assert None not in one.values()
    assert SamplingParams(priority=lines.LOWEST_PRIORITY).priority == lines.LOWEST_PRIORITY


def test_a_server_at_its_limit_is_asked_again(monkeypatch):
    monkeypatch.setattr("toolkit.serving.batches.runner.RETRY_AFTER", 0.01)
    engine = ToldEngine()
    engine.held.clear()
    client, _ = client_of(engine, max_queued_seqs=2)
    with client:
        waiting = [
            threading.Thread(target=client.post, args=(COMPLETIONS,), kwargs={"json": {"prompt": [1], "max_tokens": 1}})
            for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        end = time.monotonic() + 10
        while len(engine.live) < 1 and time.monotonic() < end:
            time.sleep(0.01)
        files = {"file": ("a", text_of(line("a", {"prompt": [1], "max_tokens": 1})))}
        file = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()
        asked_for = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
        batch = client.post("/v1/batches", json=asked_for).json()
        time.sleep(0.2)
        assert client.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"] == 0
        engine.held.set()
        while client.get(f"/v1/batches/{batch['id']}").json()["status"] != "completed" and time.monotonic() < end:
            time.sleep(0.05)
        found = client.get(f"/v1/batches/{batch['id']}").json()
        assert (found["status"], found["request_counts"]["completed"]) == ("completed", 1)
        for thread in waiting:
            thread.join()


@pytest.mark.sweep
def test_the_command_writes_what_the_server_would(server, chat_model, tmp_path):
    bodies = asked(6) + asked(6, CHATS)
    found = [line(f"r{at}", body, COMPLETIONS if "prompt" in body else CHATS) for at, body in enumerate(bodies)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text_of(*found, line("bad", {"prompt": "a", "top_p": 2})))
    command = [sys.executable, "-m", "toolkit.cli", "batch", str(source), str(target), "--model", str(chat_model)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"13 requests, 1 failed: {target}" in ran.stderr
    results = {one["custom_id"]: one["response"] for one in map(json.loads, target.read_text().splitlines())}
    assert len(results) == 13
    assert results["bad"]["status_code"] == 400
    for one in found:
        single = server.http.post(one["url"], json=one["body"]).json()
        assert without_names(results[one["custom_id"]]["body"]) == without_names(single)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_command_with_a_wrong_file_writes_nothing(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text_of(line("a", {}), line("a", {})))
    assert main(["batch", str(source), str(target), "--model", "nowhere"]) == 2
    assert "line 2: 'custom_id' of a line must be no other line's, got 'a' again." in capsys.readouterr().err
    assert main(["batch", str(tmp_path / "none"), str(target), "--model", "nowhere"]) == 2
    assert main(["batch", str(source), str(tmp_path / "none" / "out"), "--model", "nowhere"]) == 2
    assert not target.exists()


def test_embeddings_of_a_pooling_model(tmp_path):
    from tests.helpers.engine_tokenizers import byte_level

    folder = tmp_path / "model"
    random_model("llama", vocabulary=300).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text_of(*(line(f"r{at}", {"input": f"text {at}"}, "/v1/embeddings") for at in range(3))))
    assert main(["batch", str(source), str(target), "--model", str(folder), "--runner", "pooling"]) == 0
    results = list(map(json.loads, target.read_text().splitlines()))
    assert [one["response"]["status_code"] for one in results] == [200] * 3
    assert len({tuple(one["response"]["body"]["data"][0]["embedding"]) for one in results}) == 3
