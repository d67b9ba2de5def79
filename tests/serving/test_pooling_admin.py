"""Admin endpoints, limits and deadlines of a pooling model."""

import threading

import pytest
import torch
from fastapi.testclient import TestClient

from tests.helpers.pooling_models import pooling_model
from toolkit.engine import EngineUnavailable
from toolkit.engine.pooling import PoolingEngine, PoolingInput, PoolingParams, PoolingQueue
from toolkit.serving.access import AdminAccess
from toolkit.serving.app import ServerConfig, create_app
from toolkit.testing.models import tiny_tokenizer

TEXT = {"input": [5, 6, 7]}


class Opened:
    """A served pooling model, and what its engine was given."""

    def __init__(self, **options):
        self.engine = PoolingEngine(pooling_model("qwen3"))
        self.queue = PoolingQueue(self.engine)
        options = {"admin": AdminAccess(enabled=True), **options}
        config = ServerConfig("pooled", self.queue, tokenizer=tiny_tokenizer(), vocab_size=331, **options)
        self.web = TestClient(create_app(config), raise_server_exceptions=False)

    def __enter__(self):
        self.web.__enter__()
        return self

    def __exit__(self, *about):
        self.web.__exit__(*about)

    def embedding(self):
        return torch.tensor(self.web.post("/v1/embeddings", json=TEXT).json()["data"][0]["embedding"])

    def in_background(self, **headers):
        """A request on a thread that waits in the queue; its ``join`` returns the response."""
        found = []
        waits = threading.Event()
        submit = self.queue.submit

        def noted(*given):
            handle = submit(*given)
            waits.set()
            return handle

        self.queue.submit = noted
        ask = threading.Thread(
            target=lambda: found.append(self.web.post("/v1/embeddings", json=TEXT, headers=headers)), daemon=True
        )
        ask.start()
        assert waits.wait(30)
        return lambda: ask.join(30) or found[0]


@pytest.fixture(scope="module")
def opened():
    with Opened() as one:
        yield one


def ask(one, path, **given):
    response = one.web.post(path, **given)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("stop", ["/pause?mode=keep", "/sleep?level=1", "/sleep?level=0&mode=keep"])
def test_requests_wait_while_it_is_paused_or_asleep(opened, stop):
    before = opened.embedding()
    ask(opened, stop)
    paused = opened.web.get("/is_paused").json()["is_paused"]
    assert paused != opened.web.get("/is_sleeping").json()["is_sleeping"]
    join = opened.in_background()
    assert opened.queue.stats()["num_requests_waiting"] == 1
    assert opened.web.get("/load").json() == {"server_load": 1}
    ask(opened, "/resume" if paused else "/wake_up")
    response = join()
    assert torch.equal(torch.tensor(response.json()["data"][0]["embedding"]), before)


def test_an_abort_ends_what_waits_by_id_or_all(opened):
    ask(opened, "/pause?mode=keep")
    joins = [opened.in_background(**{"x-request-id": name}) for name in ("one", "two")]
    assert ask(opened, "/abort_requests", json={"request_ids": ["one", "none"]}) == {"num_aborted": 1}
    assert (joins[0]().status_code, joins[0]().json()["error"]["code"]) == (499, "aborted")
    assert ask(opened, "/abort_requests", json={"abort_all": True}) == {"num_aborted": 1}
    assert joins[1]().status_code == 499
    join = opened.in_background(**{"x-request-timeout": "0.01"})
    assert (join().status_code, join().json()["error"]["code"]) == (504, "timeout")
    ask(opened, "/resume")
    assert ask(opened, "/pause?mode=wait") == {"status": "paused"}
    ask(opened, "/resume")
    assert ask(opened, "/reset_prefix_cache") == {"success": True}


def test_weights_are_written_between_two_forwards():
    def read(folder, model, field):
        assert (folder, field) == ("there", "weight_dir")
        return {name: tensor.clone() * (1 + (name == "norm.weight")) for name, tensor in model.state_dict().items()}

    with Opened(read_weights=read) as one:
        weight = one.engine.model.norm.weight.clone()
        before, version = one.embedding(), one.web.get("/v1/models").json()["data"][0]["weight_version"]
        assert ask(one, "/init_weight_transfer_engine", json={"init_info": {}})["message"]
        assert ask(one, "/start_weight_update")["message"]
        updated = ask(one, "/update_weights", json={"weight_dir": "there"})
        assert updated["weight_version"] > version
        assert ask(one, "/finish_weight_update")["weight_version"] == updated["weight_version"]
        assert one.web.get("/v1/models").json()["data"][0]["weight_version"] == updated["weight_version"]
        after = one.engine.pool([PoolingInput(TEXT["input"])], PoolingParams(task="embed"))[0].data
        assert torch.equal(one.embedding(), after)
        assert torch.equal(one.engine.model.norm.weight, 2 * weight)
        assert torch.equal(after, before)  # a factor of the last norm goes with the length


def test_what_is_served_and_what_is_not(opened):
    info = opened.web.get("/server_info").json()
    assert info["vllm_config"]["model_config"]["runner_type"] == "pooling"
    assert info["vllm_config"]["cache_config"] is None
    assert info["numerics_fingerprint"]["numerics"] == "bitwise"
    assert opened.web.get("/get_world_size").json() == {"world_size": 1}
    assert opened.web.get("/get_model_info").json()["is_generation"] is False
    for path, words in (("/v1/load_lora_adapter", "takes no adapters"), ("/export", "use toolkit export")):
        response = opened.web.post(path, json={})
        assert (response.status_code, words in response.json()["error"]["message"]) == (400, True)
    document = opened.web.get("/openapi.json").json()["paths"]
    assert {"/pause", "/sleep", "/update_weights", "/server_info", "/abort_requests"} <= set(document)
    assert not {"/export", "/props", "/v1/load_lora_adapter"} & set(document)


def test_admin_endpoints_are_closed_without_a_key_and_clients_have_limits():
    with Opened(admin=AdminAccess(), max_requests_per_client=2) as one:
        for path in ("/pause", "/sleep", "/update_weights", "/export"):
            assert one.web.post(path, json={}).status_code == 403
        response = one.web.post("/v1/embeddings", json={"input": [[5], [6], [7]]})
        assert response.json()["error"]["message"] == "A request must have <= 2 sequences, got 3."


def test_what_is_asked_of_a_queue_that_has_ended_is_an_error():
    queue = PoolingQueue(PoolingEngine(pooling_model("qwen3")))
    assert queue.call(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        queue.call(lambda: 1 // 0)
    queue.shutdown()
    with pytest.raises(EngineUnavailable, match="thread has ended"):
        queue.call(lambda: 5)
