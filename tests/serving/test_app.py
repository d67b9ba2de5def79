"""The application in one process on an engine that does as it is told: failures, limits and keys."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.engine_standin import HistoryModel
from tests.helpers.told_engine import PROMPT, ToldEngine, client_of
from toolkit.engine import AsyncEngine, Engine, EngineUnavailable, SamplingParams
from toolkit.serving.texts import Texts
from toolkit.testing.models import tiny_tokenizer


def test_an_engine_that_fails_ends_its_requests_and_the_health():
    client, _ = client_of(ToldEngine(fail=RuntimeError("out of memory")))
    with client:
        assert client.get("/health").status_code == 200
        first = client.post("/v1/completions", json=PROMPT)
        assert first.status_code == 503
        assert first.json()["error"]["message"] == "The engine has stopped: out of memory"
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json=PROMPT).status_code == 503
        assert client.get("/metrics").status_code == 200


def test_an_engine_that_fails_ends_a_stream_with_an_error_event():
    client, _ = client_of(ToldEngine(fail=RuntimeError("out of memory")))
    with client:
        response = client.post("/v1/completions", json={**PROMPT, "stream": True})
        assert "The engine has stopped: out of memory" in response.text
        assert "[DONE]" not in response.text


def test_a_request_that_fails_in_the_engine_fails_alone():
    engine = ToldEngine(error="no such expert")
    client, _ = client_of(engine)
    with client:
        response = client.post("/v1/completions", json=PROMPT)
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "The request failed in the engine: no such expert"
        engine.error = None
        assert client.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"] == "xxx"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_runs_out_of_time_says_so(stream):
    client, async_engine = client_of(Engine(HistoryModel()), default_sampling_params={"timeout": 0.02})
    with client:
        async_engine.sleep()  # nothing runs, and time does
        response = client.post("/v1/completions", json={**PROMPT, "stream": stream})
        assert response.status_code == (200 if stream else 408)
        assert "The request failed in the engine: it ran out of time" in response.text
        assert "[DONE]" not in response.text


def test_beyond_the_limit_requests_are_refused_until_there_is_room():
    engine = ToldEngine()
    client, async_engine = client_of(engine, max_queued_seqs=2)
    responses = []
    with client:
        engine.held.clear()
        asking = threading.Thread(
            target=lambda: responses.append(client.post("/v1/completions", json={**PROMPT, "prompt": [[1], [2]]}))
        )
        asking.start()
        while not async_engine._handles:
            time.sleep(0.005)
        refused = client.post("/v1/completions", json=PROMPT)
        engine.held.set()
        asking.join(10)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "limit of 2 sequences" in refused.json()["error"]["message"]
        assert responses[0].status_code == 200
        assert client.post("/v1/completions", json=PROMPT).status_code == 200


def test_an_api_key_is_asked_for_where_models_are():
    client, _ = client_of(ToldEngine(), api_key="secret")
    with client:
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        for key in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer secrét".encode("latin-1")},
        ):
            response = client.get("/v1/models", headers=key)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        good = client.get("/v1/models", headers={"authorization": "Bearer secret"})
        assert good.json()["data"][0]["id"] == "told"


def test_without_a_tokenizer_prompts_are_token_ids():
    client, _ = client_of(ToldEngine())
    with client:
        text = client.post("/v1/completions", json={"prompt": "a"})
        chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        ids = client.post("/v1/completions", json={**PROMPT, "logprobs": 0, "stream": True})
        assert (text.status_code, chat.status_code, ids.status_code) == (400, 400, 200)
        assert "has no tokenizer" in text.json()["error"]["message"]
        assert "'messages' needs a chat template" in chat.json()["error"]["message"]
        assert "Infinity" not in ids.text  # which is not JSON
        assert "token_id:7" in ids.text


DEFAULTS = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "max_tokens": 7}


def test_what_a_request_does_not_say_is_the_checkpoints_default(monkeypatch):
    monkeypatch.setattr(Texts, "chat", lambda self, messages, truncated, **options: [1, 2, 3])
    engine, chat = ToldEngine(), {"messages": [{"role": "user", "content": "a"}]}
    client, _ = client_of(engine, default_sampling_params=DEFAULTS, max_model_len=16)

    def submitted(path, body):
        assert client.post(f"/v1/{path}", json=body).status_code == 200
        return [{name: getattr(params, name) for name in DEFAULTS} for params in engine.submitted]

    with client:
        for path, body in (("completions", {"prompt": [1]}), ("chat/completions", chat)):
            assert submitted(path, body) == [DEFAULTS]
            given = {"temperature": 1.5, "max_tokens": 3, "top_p": 1.0}
            assert submitted(path, {**body, **given}) == [{**DEFAULTS, **given}]
        assert submitted("chat/completions", {**chat, "max_completion_tokens": 2})[0]["max_tokens"] == 2
        long, short = [1] * 12, [1]
        assert [one["max_tokens"] for one in submitted("completions", {"prompt": [long, short]})] == [4, 7]
    client, _ = client_of(engine, max_model_len=16)
    with client:
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        assert submitted("completions", {"prompt": [1]}) == [{**plain, "max_tokens": 15}]  # OpenAI's 16, as they fit


def test_health_and_streams_do_not_wait_for_a_prompt_that_is_tokenised(monkeypatch):
    tokenising, tokenised = threading.Event(), threading.Event()

    def slow(self, text, *options):
        tokenising.set()
        tokenised.wait(10)
        return [1]

    monkeypatch.setattr(Texts, "prompt", slow)
    client, _ = client_of(ToldEngine())
    with client, ThreadPoolExecutor() as pool:
        slow_one = pool.submit(client.post, "/v1/completions", json={"prompt": "a"})
        assert tokenising.wait(10)
        assert client.get("/health").status_code == 200
        assert "[DONE]" in client.post("/v1/completions", json={**PROMPT, "stream": True}).text
        assert not slow_one.done()
        tokenised.set()
        assert slow_one.result(10).status_code == 200


def test_lengths_are_checked_before_anything_is_tokenised(monkeypatch):
    tokenizer = tiny_tokenizer()
    longest = max(map(len, tokenizer.get_vocab()))
    client, _ = client_of(ToldEngine(), tokenizer=tokenizer, max_model_len=16)
    monkeypatch.setattr("toolkit.serving.texts.rust_encoding", lambda *_: pytest.fail("it was tokenised"))
    monkeypatch.setattr("toolkit.serving.texts.render", lambda *_, **__: pytest.fail("it was rendered"))
    text = "a" * (16 * longest + 1)
    with client:
        for path, body, field in (
            ("completions", {"prompt": text}, "prompt"),
            ("chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ):
            response = client.post(f"/v1/{path}", json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, field)
            assert error["message"] == (
                f"{field} must have <= {16 * longest} characters, which is all that fits, got {len(text)}."
            )
        many = client.post("/v1/completions", json={"prompt": ["a"] * 9})
        assert many.json()["error"]["message"] == "The request must have <= 8 sequences, got 9."


def test_a_body_beyond_the_limit_is_refused():
    client, _ = client_of(ToldEngine())
    with client:
        assert client.post("/v1/completions", content=b" " * (4 * 2**20 + 1)).status_code == 413
        assert client.post("/v1/completions", content=b" " * (4 * 2**20)).status_code == 400
    client, _ = client_of(ToldEngine(), max_body_size=100)
    with client:
        assert client.post("/v1/completions", json=PROMPT).status_code == 200
        refused = client.post("/v1/completions", json={**PROMPT, "user": "x" * 100})
        assert refused.status_code == 413
        assert refused.json()["error"]["message"] == "The request body must have <= 100 bytes, got more."


def test_the_engine_thread_sleeps_while_there_is_nothing_to_do():
    engine = ToldEngine()
    client, async_engine = client_of(engine)
    with client:
        client.post("/v1/completions", json=PROMPT)
        used = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - used < 0.1
        assert engine.steps == 3
    assert not async_engine._thread.is_alive()


def test_a_shutdown_ends_what_waits():
    async def scenario():
        engine = ToldEngine()
        async_engine = AsyncEngine(engine)
        handle = async_engine.submit([[1]], SamplingParams(max_tokens=10**9))
        await handle.wait_accepted()
        await asyncio.to_thread(async_engine.shutdown, close_engine=False)
        with pytest.raises(EngineUnavailable, match="shutting down"):
            async for _ in handle:
                pass
        with pytest.raises(EngineUnavailable, match="shutting down"):
            async_engine.submit([[1]], SamplingParams())
        assert engine.cancelled == [0]

    asyncio.run(scenario())


def test_a_cancelled_submission_leaves_nothing_behind():
    async def scenario():
        engine = ToldEngine()
        engine.held.clear()
        async_engine = AsyncEngine(engine, max_queued_seqs=2)
        first = async_engine.submit([[1]], SamplingParams(max_tokens=10**9))
        await first.wait_accepted()
        second = async_engine.submit([[2]], SamplingParams(max_tokens=10**9))
        waiting = asyncio.create_task(second.wait_accepted())
        await asyncio.sleep(0.05)
        waiting.cancel()
        engine.held.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        first.cancel()
        while async_engine._handles:
            await asyncio.sleep(0.005)
        assert not engine.live
        assert async_engine._num_queued == 0
        await asyncio.to_thread(async_engine.shutdown, close_engine=False)

    asyncio.run(scenario())
