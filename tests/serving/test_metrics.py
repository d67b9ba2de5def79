"""The metrics of a server: vLLM's names, and numbers that add up."""

import re
import threading
import time

import pytest
from fastapi.testclient import TestClient

from tests.helpers.engine_standin import HistoryModel
from toolkit.engine import AsyncEngine, Engine
from toolkit.serving.access import AdminAccess
from toolkit.serving.app import ServerConfig, create_app
from toolkit.serving.metrics import Metrics

VLLM_NAMES = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries_total": "counter",
    "prefix_cache_hits_total": "counter",
    "num_preemptions_total": "counter",
    "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter",
    "request_success_total": "counter",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_params_n": "histogram",
    "request_params_max_tokens": "histogram",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "spec_decode_num_drafts_total": "counter",
    "spec_decode_num_draft_tokens_total": "counter",
    "spec_decode_num_accepted_tokens_total": "counter",
}
"""Those of vLLM's ``/metrics`` that this server has, behind ``vllm:``."""


@pytest.fixture
def client():
    metrics = Metrics()
    engine = AsyncEngine(Engine(HistoryModel(), block_size=4), listener=metrics)
    config = ServerConfig("history", engine, metrics, vocab_size=60, admin=AdminAccess(enabled=True))
    with TestClient(create_app(config)) as one:
        yield one


def readings(client):
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def ask(client, **fields):
    body = {"prompt": [3, 1, 4, 1, 5, 9, 2, 6], "max_tokens": 5, "ignore_eos": True, **fields}
    return client.post("/v1/completions", json=body).raise_for_status()


def test_the_names_and_kinds_are_those_of_vllm(client):
    found = dict(re.findall(r"^# TYPE toolkit:(\w+) (\w+)$", client.get("/metrics").text, re.M))
    assert {name: found.get(name) for name in VLLM_NAMES} == VLLM_NAMES
    offloading = {name for name in found if name.startswith(("kv_host_", "kv_disk_", "kv_restored_"))}
    assert len(offloading) == 8
    beside = set(found) - set(VLLM_NAMES) - offloading
    assert beside == {"http_requests_total", "num_blocks", "num_cached_blocks", "weight_version"}


def test_every_part_of_a_request_s_time_is_counted_once(client):
    ask(client, prompt=[[1, 2, 3], [4, 5, 6, 7]], n=2)
    ask(client, max_tokens=1)
    after = readings(client)

    def total(name):
        return after[f"toolkit:{name}_sum"]

    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time", "request_prefill_time"):
        assert after[f"toolkit:{name}_seconds_count"] == 5, name
    assert after["toolkit:request_decode_time_seconds_count"] == 5
    assert after["toolkit:request_time_per_output_token_seconds_count"] == 4  # of one token there is none
    e2e, inference = total("e2e_request_latency_seconds"), total("request_inference_time_seconds")
    assert total("request_queue_time_seconds") + inference == pytest.approx(e2e)
    parts = total("request_prefill_time_seconds") + total("request_decode_time_seconds")
    assert parts == pytest.approx(inference)
    first = total("request_queue_time_seconds") + total("request_prefill_time_seconds")
    assert first == pytest.approx(total("time_to_first_token_seconds"))
    assert total("request_prompt_tokens") == 2 * 3 + 2 * 4 + 8
    assert total("request_generation_tokens") == 4 * 5 + 1 == after["toolkit:generation_tokens_total"]
    assert (total("request_params_n"), after["toolkit:request_params_n_count"]) == (2 + 2 + 1, 3)
    assert total("request_params_max_tokens") == 5 + 5 + 1
    assert after['toolkit:request_generation_tokens_bucket{le="1.0"}'] == 1
    assert after['toolkit:request_generation_tokens_bucket{le="5.0"}'] == 5


def test_the_time_before_a_request_runs_is_its_queue_time(client):
    client.post("/pause?mode=keep")
    asking = threading.Thread(target=ask, args=(client,))
    asking.start()
    while client.get("/load").json()["server_load"] == 0:
        time.sleep(0.005)
    time.sleep(0.3)
    client.post("/resume")
    asking.join(10)
    after = readings(client)
    assert after["toolkit:request_queue_time_seconds_sum"] >= 0.3
    assert after["toolkit:e2e_request_latency_seconds_sum"] >= 0.3
    assert after["toolkit:request_queue_time_seconds_count"] == 1


def test_what_never_ran_has_an_end_and_no_times(client):
    client.post("/pause?mode=keep")
    response = client.post(
        "/v1/completions", json={"prompt": [1, 2], "max_tokens": 3}, headers={"x-request-timeout": "0.05"}
    )
    assert response.status_code == 504
    client.post("/resume")
    after = readings(client)
    assert after['toolkit:request_success_total{finished_reason="cancelled"}'] == 1
    assert after["toolkit:e2e_request_latency_seconds_count"] == 1
    for name in ("request_queue_time", "request_inference_time", "request_prefill_time", "request_decode_time"):
        assert after[f"toolkit:{name}_seconds_count"] == 0


def test_looked_up_prompt_tokens_are_counted_beside_the_hits(client):
    ask(client)
    ask(client)
    after = readings(client)
    assert after["toolkit:prefix_cache_queries_total"] == 16
    assert 0 < after["toolkit:prefix_cache_hits_total"] < 8
