"""A real server process with a tiny random model, asked through the ``openai`` client and plain HTTP."""

import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from tests.helpers.server_process import serving
from toolkit.serving.openai import schemas

GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
PROMPT = "the quick brown fox"
CHAT = [{"role": "user", "content": "jumps over"}]


@pytest.fixture(scope="module")
def server(chat_model):
    with serving(chat_model, *("--port", "0", "--grace", "3", "--max-num-seqs", "16", "--max-queue", "64")) as one:
        assert re.fullmatch(r"serving tiny on http://127\.0\.0\.1:\d+\n", one.line), one
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="any", max_retries=0, timeout=60)
        with httpx.Client(base_url=one.url, timeout=60) as http:
            yield SimpleNamespace(url=one.url, client=client, http=http, process=one.process, errors=one.errors)


@pytest.fixture
def client(server):
    return server.client


def readings(server):
    lines = server.http.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def complete(client, prompt=PROMPT, max_tokens=12, **fields):
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, **fields)


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="must be 'tiny', got 'large'"):
        client.models.retrieve("large")


def test_a_completion_counts_its_tokens_and_says_why_it_ended(client, chat_model):
    from transformers import AutoTokenizer

    response = complete(client, **GREEDY)
    (choice,) = response.choices
    prompt = AutoTokenizer.from_pretrained(chat_model)(PROMPT)["input_ids"]
    assert choice.finish_reason == "length"
    assert response.usage.completion_tokens == 12
    assert response.usage.prompt_tokens == len(prompt)
    assert response.usage.total_tokens == 12 + len(prompt)
    assert complete(client, prompt, **GREEDY).choices[0].text == choice.text


def test_greedy_tokens_are_those_of_plain_transformers(client, chat_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float64)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        exact = model(ids).logits[0].log_softmax(-1)
    start = ids.shape[1] - 12
    response = complete(client, logprobs=3, **GREEDY)
    got = response.choices[0].logprobs
    assert response.choices[0].text == tokenizer.decode(ids[0, start:])
    assert len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == len(got.text_offset) == 12
    for at in range(12):
        best = exact[start + at - 1].topk(3).values
        assert got.token_logprobs[at] == pytest.approx(float(best[0]), abs=1e-4)
        top = list(got.top_logprobs[at].values())
        assert top == pytest.approx(best.tolist(), abs=1e-4)


def test_many_prompts_with_n_choices_come_in_order(client):
    prompts = [PROMPT, "lazy", "dog"]
    alone = [complete(client, prompt, seed=7, n=2).choices for prompt in prompts]
    together = complete(client, prompts, seed=7, n=2).choices
    assert [choice.index for choice in together] == list(range(6))
    assert [choice.text for choice in together] == [choice.text for pair in alone for choice in pair]
    assert together[0].text != together[1].text


@pytest.mark.parametrize("fields", [GREEDY, {"seed": 3, "n": 2, "top_p": 0.9}], ids=["greedy", "seeded"])
def test_a_streamed_completion_is_the_whole_one_in_chunks(client, fields):
    whole = complete(client, max_tokens=40, **fields)
    texts, reasons = {}, {}
    used = None
    for chunk in complete(client, max_tokens=40, stream=True, stream_options={"include_usage": True}, **fields):
        used = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert used == whole.usage


@pytest.mark.parametrize("fields", [GREEDY, {"seed": 3, "n": 2}], ids=["greedy", "seeded"])
def test_a_streamed_chat_is_the_whole_one_in_chunks(client, fields):
    asked = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 30, "logprobs": True, **fields}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for choice in whole.choices:
        mine = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        logprobs = [entry for one in mine if one.logprobs for entry in one.logprobs.content]
        assert logprobs == choice.logprobs.content


def test_a_chat_goes_through_the_models_template(client):
    parts = [{"type": "text", "text": "jumps "}, {"type": "text", "text": "over"}]
    responses = [
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=16, **GREEDY
        )
        for content in ("jumps over", parts)
    ]
    plain = complete(client, "user: jumps over\nassistant:", max_tokens=16, **GREEDY)
    assert {response.choices[0].message.content for response in responses} == {plain.choices[0].text}
    assert responses[0].usage == plain.usage
    assert responses[0].choices[0].message.role == "assistant"


def test_chat_logprobs_spell_the_text_in_bytes(client):
    response = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=24,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    (choice,) = response.choices
    spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert spelled.decode(errors="replace") == choice.message.content
    for entry in choice.logprobs.content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


@pytest.mark.parametrize("logprobs", [False, True])
def test_responses_are_what_the_openapi_document_says(server, logprobs):
    asked = {"max_tokens": 3, "n": 2}
    text = {**asked, "prompt": PROMPT, **({"logprobs": 2} if logprobs else {})}
    schemas.CompletionObject.model_validate(server.http.post("/v1/completions", json=text).json())
    chat = {**asked, "messages": CHAT, **({"logprobs": True, "top_logprobs": 2} if logprobs else {})}
    schemas.ChatCompletionObject.model_validate(server.http.post("/v1/chat/completions", json=chat).json())
    schemas.ModelList.model_validate(server.http.get("/v1/models").json())
    schemas.ErrorResponse.model_validate(server.http.post("/v1/completions", json={}).json())


def test_the_raw_stream_ends_with_done(server):
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    response = server.http.post("/v1/completions", json=body)
    events = response.text.split("\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_a_stop_string_is_cut_and_never_shown(client):
    text = complete(client, max_tokens=40, **GREEDY).choices[0].text
    stop = text[12:15]
    whole = complete(client, max_tokens=40, stop=["never to be found", stop], **GREEDY).choices[0]
    streamed = complete(client, max_tokens=40, stop=stop, stream=True, **GREEDY)
    assert whole.text == text[: text.index(stop)]
    assert whole.finish_reason == "stop"
    assert whole.stop_reason == stop
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == whole.text


def test_many_clients_at_once_get_what_each_would_get_alone(server):
    def ask(seed):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)
        stream = complete(client, f"fox {seed % 3}", max_tokens=5 + seed, seed=seed, stream=True)
        return "".join(choice.text for chunk in stream for choice in chunk.choices)

    alone = [ask(seed) for seed in range(10)]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(ask, range(10))) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(server, stream):
    before = readings(server)
    body = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 2}
    if stream:
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # held: httpx closes the connection when the iterator goes
            next(lines)
            assert readings(server)["toolkit:num_requests_running"] == 2
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.5))
    cancelled = 'toolkit:request_success_total{finished_reason="cancelled"}'
    until(lambda: readings(server).get(cancelled, 0) == before.get(cancelled, 0) + 2)
    until(lambda: readings(server)["toolkit:num_requests_running"] == 0)
    after = readings(server)
    assert after["toolkit:generation_tokens_total"] - before["toolkit:generation_tokens_total"] < 7900
    assert after["toolkit:kv_cache_usage_perc"] == 0


def test_metrics_count_what_was_done(server):
    before = readings(server)
    complete(server.client, "jumps over the lazy dog", max_tokens=9, n=2, **GREEDY)
    after = readings(server)
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert grown["toolkit:generation_tokens_total"] == 18
    assert grown["toolkit:prompt_tokens_total"] > 0
    assert grown['toolkit:request_success_total{finished_reason="length"}'] == 2
    assert grown['toolkit:http_requests_total{path="/v1/completions",status="200"}'] == 1
    assert grown["toolkit:time_to_first_token_seconds_count"] == 2
    assert grown["toolkit:inter_token_latency_seconds_count"] == 16
    for name in ("time_to_first_token", "inter_token_latency"):
        assert after[f'toolkit:{name}_seconds_bucket{{le="+Inf"}}'] == after[f"toolkit:{name}_seconds_count"]
    assert after["toolkit:num_requests_running"] == after["toolkit:num_requests_waiting"] == 0
    assert server.http.get("/health").json() == {"status": "ok"}


COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
WRONG = [
    (COMPLETIONS, {"prompt": "a", "tempature": 1}, 400, "tempature", "did you mean 'temperature'?"),
    (COMPLETIONS, {}, 400, "prompt", "'prompt' is required."),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "prompt must have >= 1 tokens, got 0."),
    (COMPLETIONS, {"prompt": [3, 320]}, 400, "prompt", "'prompt' must have token ids from 0 to "),
    (COMPLETIONS, {"prompt": "a", "model": "large"}, 404, "model", "'model' must be 'tiny', got 'large'."),
    (
        COMPLETIONS,
        {"prompt": "a", "temperature": -1},
        400,
        "temperature",
        "a finite number >= 0, got -1.0.",
    ),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p", "top_p must be a finite number > 0 and <= 1, got 0"),
    (
        COMPLETIONS,
        {"prompt": "a", "max_tokens": -1},
        400,
        "max_tokens",
        "must be an integer >= 0 or None, got -1.",
    ),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 5000}, 400, "max_tokens", ", got 5000."),
    (COMPLETIONS, {"prompt": [9] * 4096}, 400, "prompt", ", got 4096."),
    (COMPLETIONS, {"prompt": ["a"] * 65}, 400, None, "The request must have <= 64 sequences, got 65."),
    (COMPLETIONS, {"prompt": "a", "seed": 2**70}, 400, "seed", "seed must be an integer"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop", "stop must be a string"),
    (
        COMPLETIONS,
        {"prompt": "a", "min_tokens": 9, "max_tokens": 3},
        400,
        "min_tokens",
        "must be <= max_tokens (3), got 9.",
    ),
    (COMPLETIONS, {"prompt": "a", "audio": {}}, 400, "audio", "does not offer 'audio'"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix", "has no fill-in-the-middle tokens"),
    (CHATS, {"messages": []}, 400, "messages", "a list of at least 1"),
    (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "no tools here"),
    (CHATS, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", "'user'"),
    (CHATS, {"messages": CHAT, "tools": [{}]}, 400, "tools[0].function", "is required"),
    ("/v1/audio/speech", {"input": "a"}, 404, None, "There is no POST /v1/audio/speech."),
    ("/v1/embeddings", {"input": "a"}, 400, "model", "The served model generates; serve a pooling model"),
    ("/health", {}, 405, None, "POST /health is not allowed."),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), WRONG)
def test_a_wrong_request_gets_one_clear_sentence(server, path, body, status, param, words):
    response = server.http.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == param


def test_a_body_that_is_no_json_is_refused(server):
    response = server.http.post(COMPLETIONS, content=b"{'prompt'")
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


# The last test of the module: it ends the module's server.
def resident_mib(server):
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


LARGE = {
    "text": json.dumps({"prompt": "the quick brown fox " * 200_000}),
    "token ids": json.dumps({"prompt": [1] * 500_000}),
    "lists": '{"prompt": [' + "[]," * 1_300_000 + "1]}",
    "stop strings": json.dumps({"prompt": "a", "stop": [f"s{at}" for at in range(100_000)]}),
    "fields": json.dumps({"prompt": "a", **{f"k{at}": 1 for at in range(60_000)}}),
    "logit_bias": json.dumps({"prompt": "a", "logit_bias": dict.fromkeys(range(60_000), 1)}),
    "nested": '{"prompt": ' + "[" * 30_000 + "]" * 30_000 + "}",
    "digits": '{"prompt": "a", "max_tokens": ' + "9" * 4_000_000 + "}",
}
LONG_PROMPTS = json.dumps({"prompt": ["the quick brown fox " * 150] * 8, "max_tokens": 1})


@pytest.mark.soak
def test_no_single_request_keeps_the_others_waiting_or_the_memory(server):
    """Everybody else meanwhile: /health, and a stream, whose tokens come within the step that is under way."""

    def waits(ask=lambda: time.sleep(0.3)):
        """The longest that /health took, and the longest gap in a stream."""
        took, gaps, done = [], [], threading.Event()

        def watch_health():
            with httpx.Client(base_url=server.url, timeout=60) as http:
                while not done.is_set():
                    start = time.perf_counter()
                    assert http.get("/health").status_code == 200
                    took.append(time.perf_counter() - start)
                    time.sleep(0.005)

        def watch_stream():
            body = {"prompt": [1], "max_tokens": 4000, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                last = None
                for line in response.iter_lines():
                    now = time.perf_counter()
                    if last is not None and line:
                        gaps.append(now - last)
                    last = now if line else last
                    if done.is_set():
                        return

        with ThreadPoolExecutor(2) as pool:
            watching = [pool.submit(watch_health), pool.submit(watch_stream)]
            while not gaps:
                time.sleep(0.005)
            ask()
            done.set()
            [one.result() for one in watching]
        return max(took), max(gaps)

    def ask_large():
        for name, body in LARGE.items():
            response = server.http.post("/v1/completions", content=body)
            assert response.status_code == 400, name
            assert len(response.content) < 1000, name
        assert server.http.post("/v1/completions", content=b"x" * (8 << 20)).status_code == 413

    quiet, quiet_gap = waits()
    ask_large()  # once, so that what stays allocated for good is
    time.sleep(1.5)
    before = resident_mib(server)
    # Other processes share the machine: what they cost a quiet server is allowed on top, and a pause of theirs does not
    # come three times; a request that keeps others waiting does.
    tries = [waits(ask_large) for _ in range(3)]
    assert min(health for health, _ in tries) < 0.1 + 3 * quiet
    assert min(gap for _, gap in tries) < 0.1 + 3 * quiet_gap
    time.sleep(1.5)  # memory goes back a second after
    assert resident_mib(server) < before + 40
    long = [waits(lambda: server.http.post("/v1/completions", content=LONG_PROMPTS).raise_for_status()) for _ in "abc"]
    assert min(health for health, _ in long) < 0.1 + 3 * quiet


def test_sigterm_lets_short_requests_finish_and_ends_with_status_0(server):
    outcome = {}

    def ask(name, max_tokens, n):
        body = {"prompt": PROMPT, "max_tokens": max_tokens, "n": n, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    started[name].set()
                    outcome[name] = line

    started = {"short": threading.Event(), "long": threading.Event()}
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, "long", 4000, 8), pool.submit(ask, "short", 20, 1)]
        assert all(event.wait(20) for event in started.values())
        server.process.send_signal(signal.SIGTERM)
        for one in asked:
            one.result(timeout=20)
    assert server.process.wait(timeout=20) == 0
    assert outcome["short"] == "data: [DONE]"
    error = json.loads(outcome["long"].removeprefix("data: "))["error"]
    assert error["message"] == "The engine is shutting down."
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    assert not any("Traceback" in line or "nanobind" in line for line in server.errors), server.errors
