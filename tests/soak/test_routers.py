"""``docs/router.md``: two ``toolkit serve`` behind nginx and behind vllm-router."""

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.routers import ROUTERS
from tests.helpers.server_process import ServerProcess, serving
from toolkit.testing.models import random_model, tiny_tokenizer

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]

CONVERSATIONS, TURNS, CONCURRENT = 12, 4, 16
OPTIONS = ("--port", "0", "--max-model-len", "1024", "--max-num-seqs", "4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trl.chat_template_utils import qwen3_chat_template

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    random_model("llama", vocabulary=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def count(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=120).text
    (found,) = re.findall(rf"^toolkit:{name} (\S+)$", text, re.MULTILINE)
    return float(found)


def ask(url: str, messages: list[dict[str, str]], **fields: Any) -> Any:
    body = {"model": "tiny", "messages": messages, "seed": 7, "logprobs": True, **fields}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=900)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def converse(url: str) -> list[str]:
    """Turn by turn, all conversations at a time."""
    first = [f"{chr(97 + at)} begins this conversation, so no block is any other's." for at in range(CONVERSATIONS)]
    conversations = [[{"role": "user", "content": text}] for text in first]
    replies = []
    with ThreadPoolExecutor(CONVERSATIONS) as threads:
        for turn in range(TURNS):
            responses = list(threads.map(lambda one: ask(url, one, max_tokens=12, min_tokens=12), conversations))
            for messages, response in zip(conversations, responses):
                content = response["message"]["content"]
                replies.append(content)
                messages += [{"role": "assistant", "content": content}, {"role": "user", "content": f"More {turn}."}]
    return replies


def cache_of(servers: list[ServerProcess]) -> tuple[float, float]:
    """Tokens looked up in the prefix caches, and found there."""
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
    queries, hits = (sum(count(server, name) for server in servers) for name in names)
    return queries, hits


@pytest.mark.parametrize("router", list(ROUTERS))
def test_prefix_affinity_finds_what_one_replica_finds(router, model, tmp_path):
    found = {}
    for affinity in (True, False):
        with ExitStack() as stack:
            servers = [stack.enter_context(serving(model, *OPTIONS)) for _ in range(2)]
            urls = [server.url for server in servers]
            before = cache_of(servers)
            replies = converse(stack.enter_context(ROUTERS[router](tmp_path / f"router-{affinity}", urls, affinity)))
            queries, hits = (now - then for now, then in zip(cache_of(servers), before))
            found[affinity] = replies, queries, hits
            prompts = [count(server, "prompt_tokens_total") for server in servers]
            print(f"{router}, affinity {affinity}: prompt tokens of the replicas {prompts}")
            assert all(prompts)
    with serving(model, *OPTIONS) as alone:
        replies = converse(alone.url)
        queries, hits = cache_of([alone])
    assert found[True][0] == found[False][0] == replies
    assert found[True][1] == found[False][1] == queries
    shares = {kind: round(found[kind][2] / queries, 3) for kind in (True, False)}
    print(f"{router}: hits with affinity {shares[True]}, in turn {shares[False]}, one replica {hits / queries:.3f}")
    assert found[True][2] == hits if router == "nginx" else found[True][2] >= 0.9 * hits
    assert found[False][2] < 0.8 * hits


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_dead_replica_loses_no_request_that_is_not_streamed(router, model, tmp_path):
    prompts = [[{"role": "user", "content": f"Request {at} is like no other one."}] for at in range(CONCURRENT)]
    settings = {"max_tokens": 200, "min_tokens": 200}
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(model, *OPTIONS)) for _ in range(2)]
        url = stack.enter_context(ROUTERS[router](tmp_path / "router", [server.url for server in servers]))
        with ThreadPoolExecutor(CONCURRENT) as threads:
            asked = [threads.submit(ask, url, prompt, **settings) for prompt in prompts]
            end = time.monotonic() + 300
            while not all(count(server, "num_requests_running") for server in servers):
                assert not all(one.done() for one in asked)
                assert time.monotonic() < end
            servers[0].process.send_signal(signal.SIGKILL)
            responses = [one.result() for one in asked]
        later = ask(url, prompts[0], max_tokens=8, min_tokens=8)
        expected = [ask(servers[1].url, prompt, **settings) for prompt in prompts]
    assert later["finish_reason"] == "length"
    assert [one["message"] for one in responses] == [one["message"] for one in expected]
    assert [one["logprobs"] for one in responses] == [one["logprobs"] for one in expected]


@pytest.mark.parametrize("router", list(ROUTERS))
def test_streams_come_token_by_token(router, model, tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 900, "min_tokens": 900, "stream": True}
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(model, *OPTIONS)) for _ in range(2)]
        url = stack.enter_context(ROUTERS[router](tmp_path / "router", [server.url for server in servers]))
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=900) as response:
            lines = response.iter_lines()
            first = next(lines)
            generated = sum(count(server, "generation_tokens_total") for server in servers)
            events = [first, *lines]
    assert generated < 900  # the first event came while the rest was still to be generated
    assert "data: [DONE]" in events[-2:]
    deltas = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
    assert len(deltas) > 10
