"""Tinker's wire, spoken with httpx: keys, promises, numbered requests, protobuf. The client itself is a soak test."""

import io
import tarfile
import threading
from itertools import pairwise
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import zstandard
from tinker.proto import tinker_public_pb2 as pb

from tests.helpers.app_on_port import on_a_port
from tests.helpers.live import live_engine
from toolkit.live import LiveConfig, LiveTraining
from toolkit.serving.app import ServerConfig, create_app

PROTOBUF = {"content-type": "application/x-protobuf"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    with live_engine() as engine:
        live = LiveTraining(engine, LiveConfig(("tiny", "other-name"), folder, tokenizer="/models/tiny"))
        config = ServerConfig("tiny", engine, live=live, vocab_size=engine.engine.vocab_size, max_model_len=512)
        with on_a_port(create_app(config)) as url:
            headers = {"X-API-Key": "tml-local"}
            with httpx.Client(base_url=f"{url}/api/v1/", headers=headers, timeout=60) as http:
                yield SimpleNamespace(http=http, live=live)


def post(server, route, /, **body):
    response = server.http.post(route, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def result(server, promise):
    """What a promise gives: JSON, or the bytes of a message."""
    while True:
        response = server.http.post("retrieve_future", json={"request_id": promise["request_id"]})
        assert response.status_code == 200, response.text
        if response.headers["content-type"] == "application/x-protobuf":
            return response.content
        body = response.json()
        if body.get("type") != "try_again":
            return body


@pytest.fixture
def model(server):
    """A session's new training client."""
    session = post(server, "create_session", tags=[], user_metadata=None, sdk_version="0.38.0")["session_id"]
    lora = {"rank": 4, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}
    asked = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": "tiny",
        "lora_config": lora,
        "type": "create_model",
    }
    promise = post(server, "create_model", **asked)
    assert result(server, promise) == {"type": "create_model", "model_id": promise["model_id"]}
    yield SimpleNamespace(id=promise["model_id"], session=session)
    post(server, f"sessions/{session}/finish")


def message(model_id, seq_id, loss_fn="cross_entropy", sequences=((5, 6, 7, 8), (9, 10, 11)), **inputs):
    asked = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn=loss_fn)
    for tokens in sequences:
        datum = asked.data.add()
        datum.model_input.add().encoded_text.tokens = np.array(tokens[:-1], np.int32).tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dtype, target.dense = pb.DTYPE_INT64, np.array(tokens[1:], np.int64).tobytes()
        for name, values in inputs.items():
            one = datum.loss_fn_inputs[name]
            one.dtype, one.dense = pb.DTYPE_FLOAT32, np.full(len(tokens) - 1, values, np.float32).tobytes()
    return asked


def forward_backward(server, asked, compress=False):
    raw, headers = asked.SerializeToString(), dict(PROTOBUF)
    if compress:
        raw, headers["content-encoding"] = zstandard.ZstdCompressor().compress(raw), "zstd"
    response = server.http.post("forward_backward", content=raw, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def output(raw):
    """(sum of the losses, log-probabilities of each example) of a result."""
    found = pb.ForwardBackwardOutput.FromString(raw)
    (record,) = found.loss_fn_outputs
    values, offsets = record.fields["logprobs"].data, np.frombuffer(record.fields["logprobs"].offsets, np.int64)
    rows = [np.frombuffer(values[low:high], np.float32) for low, high in pairwise(offsets)]
    return found.metrics["loss:sum"], rows


def sample(server, session, seq_id, prompt, **given):
    asked = {"sampling_session_id": session, "seq_id": seq_id, "prompt": {"chunks": [{"tokens": prompt}]}}
    params = {"max_tokens": 6, "seed": 3, "stop": [], **given.pop("sampling_params", {})}
    promise = post(server, "asample", **asked, sampling_params=params, **given)
    found = pb.SampleResponse.FromString(result(server, promise))
    assert len(promise["sample_sequence_ids"]) == len(found.sequences)
    return found


def test_a_client_trains_and_samples_what_it_trained(server, model):
    first = output(result(server, forward_backward(server, message(model.id, 1), compress=True)))
    assert [len(row) for row in first[1]] == [3, 2]
    assert first[0] == pytest.approx(-sum(float(row.sum()) for row in first[1]), rel=1e-5)  # weights are 1
    adam = {
        "learning_rate": 0.01,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-12,
        "weight_decay": 0.0,
        "grad_clip_norm": 0.0,
    }
    step = result(server, post(server, "optim_step", model_id=model.id, seq_id=2, adam_params=adam, type="optim_step"))
    assert step["metrics"]["grad_norm"] > 0
    saved = post(
        server, "save_weights_for_sampler", model_id=model.id, seq_id=3, kind="snapshot", sampling_session_seq_id=0
    )
    session = result(server, saved)["sampling_session_id"]
    found = sample(server, session, 0, [5, 6, 7], num_samples=2, prompt_logprobs=True, topk_prompt_logprobs=3)
    tokens = [np.frombuffer(one.tokens, np.int32).tolist() for one in found.sequences]
    assert [len(one) for one in tokens] == [6, 6]
    asked = message(model.id, 4, sequences=[[5, 6, 7, *one] for one in tokens])
    asked.forward_only = True
    loss, rows = output(result(server, forward_backward(server, asked)))
    assert loss < first[0] * 10
    for row, one in zip(rows, found.sequences):  # kl_sample_train is 0: bitwise
        assert row[2:].tobytes() == one.logprobs
        assert row[:2].tobytes() == found.prompt_logprobs[4:]
    assert np.isnan(np.frombuffer(found.prompt_logprobs, np.float32)[0])
    top = found.topk_prompt_logprobs
    assert (top.k, top.length) == (3, 3)
    assert np.frombuffer(top.logprobs, np.float32)[:3].tolist() == [-99999.0] * 3
    again = sample(server, session, 1, [5, 6, 7], sampling_params={"stop": [tokens[0][1]]})
    assert np.frombuffer(again.sequences[0].tokens, np.int32).tolist() == tokens[0][:2]
    assert again.sequences[0].stop_reason == pb.STOP_REASON_STOP


def test_requests_are_applied_once_and_in_order(server, model):
    """A step that comes before its gradients waits for them; it is pending until then, and a retry changes nothing."""
    early = post(server, "optim_step", model_id=model.id, seq_id=2, adam_params={"learning_rate": 0.01})
    pending = threading.Thread(target=lambda: result(server, early))
    pending.start()
    asked = message(model.id, 1)
    promises = [forward_backward(server, asked) for _ in range(3)]
    assert promises[0] == promises[1] == promises[2]
    first = result(server, promises[0])
    assert post(server, "optim_step", model_id=model.id, seq_id=2, adam_params={"learning_rate": 9.0}) == early
    pending.join(60)
    norm = result(server, early)["metrics"]["grad_norm"]
    tenant = server.live.tenant(model.id)
    assert (tenant.optimizer.step, tenant.gradients) == (1, None)
    assert result(server, forward_backward(server, asked)) == first
    result(server, forward_backward(server, message(model.id, 3, weights=0.0)))
    later = post(server, "optim_step", model_id=model.id, seq_id=4, adam_params={"learning_rate": 0.0})
    assert result(server, later)["metrics"]["grad_norm"] == 0 < norm


def test_checkpoints(server, model):
    saved = result(server, post(server, "save_weights", model_id=model.id, seq_id=1, path="one"))
    assert saved == {"type": "save_weights", "path": f"tinker://{model.id}/weights/one"}
    info = post(server, "weights_info", tinker_path=saved["path"])
    lora = {"train_attn": True, "train_mlp": True, "train_unembed": True}
    assert info == {"base_model": "tiny", "is_lora": True, "lora_rank": 4, **lora}
    loaded = post(server, "load_weights", model_id=model.id, seq_id=2, path=saved["path"], optimizer=True)
    assert result(server, loaded)["model_id"] == model.id
    made = post(server, "load_weights", session_id=model.session, model_seq_id=1, path=saved["path"], optimizer=False)
    other = result(server, made)["model_id"]
    about = post(server, "get_info", model_id=other)
    assert (about["lora_rank"], about["model_data"]["tokenizer_id"]) == (4, "/models/tiny")
    sampler = result(server, post(server, "save_weights_for_sampler", model_id=other, seq_id=1, path="s"))["path"]
    asked = {"session_id": model.session, "sampling_session_seq_id": 5, "model_path": sampler}
    session = post(server, "create_sampling_session", **asked)["sampling_session_id"]
    assert server.http.get(f"samplers/{session}").json()["model_path"] == sampler
    base = post(
        server,
        "create_sampling_session",
        **asked | {"sampling_session_seq_id": 6, "model_path": None},
        base_model="tiny",
    )
    of_base = sample(server, base["sampling_session_id"], 0, [5, 6])
    assert sample(server, session, 0, [5, 6]) == of_base  # B is 0: nothing is added yet
    assert result(server, post(server, "unload_model", model_id=other)) == {"type": "unload_model", "model_id": other}
    assert server.http.post("get_info", json={"model_id": other}).status_code == 400


def test_checkpoints_are_listed_kept_for_a_while_downloaded_and_removed(server, model):
    http, saved = server.http, {}
    for number, (route, name) in enumerate(
        [("save_weights", "w"), ("save_weights_for_sampler", "s"), ("save_weights_external", "e")], 1
    ):
        given = {"ttl_seconds": 7200} if name == "w" else {}
        saved[name] = result(server, post(server, route, model_id=model.id, seq_id=number, path=name, **given))["path"]
    run = http.get(f"training_runs/{model.id}").json()
    assert (run["base_model"], run["lora_rank"]) == ("tiny", 4)
    assert (run["last_checkpoint"]["tinker_path"], run["last_sampler_checkpoint"]["tinker_path"]) == (
        saved["w"],
        saved["s"],
    )
    runs = http.get("training_runs", params={"limit": 1, "access_scope": "owned"}).json()
    assert [one["training_run_id"] for one in runs["training_runs"]] == [model.id]  # the latest request first
    found = http.get(f"training_runs/{model.id}/checkpoints").json()["checkpoints"]
    assert {one["checkpoint_id"]: one["checkpoint_type"] for one in found} == {
        "weights/w": "training",
        "sampler_weights/s": "sampler",
        "external_weights/e": "external",
    }
    assert [one["checkpoint_id"] for one in found if one["expires_at"] is not None] == ["weights/w"]
    everything = http.get("checkpoints", params={"limit": 2}).json()
    assert len(everything["checkpoints"]) == 2
    assert everything["cursor"]["total_count"] >= 3

    at = f"training_runs/{model.id}/checkpoints"
    assert http.put(f"{at}/weights/w/ttl", json={"ttl_seconds": None}).status_code == 204
    assert http.put(f"{at}/sampler_weights/s/ttl", json={"ttl_seconds": 3600}).status_code == 204
    assert http.put(f"{at}/weights/w/ttl", json={"ttl_seconds": 60}).status_code == 400
    found = http.get(at).json()["checkpoints"]
    assert [one["checkpoint_id"] for one in found if one["expires_at"] is not None] == ["sampler_weights/s"]

    urls = http.get(f"{at}/external_weights/e/external_weights_urls").json()["urls"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= urls.keys()
    folder = server.live.checkpoints.folder(saved["e"])
    for name, url in urls.items():
        assert httpx.get(url).content == (folder / name).read_bytes()  # without a key
    assert httpx.get(urls["adapter_config.json"].replace("adapter_config.json", "tinker.json")).status_code == 403
    archive = http.get(f"{at}/weights/w/archive", follow_redirects=True)
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        assert {"adapter_model.safetensors", "optimizer.safetensors"} <= set(tar.getnames())

    assert http.delete(f"{at}/sampler_weights/s").status_code == 204
    removed = http.delete(f"{at}/sampler_weights/s")
    assert (removed.status_code, "saved here" in removed.json()["detail"]) == (404, True)
    assert http.get("training_runs/nobody").status_code == 404
    assert http.get("checkpoints", params={"limit": 0}).status_code == 400


def test_all_samples_of_a_session_are_waited_for_at_once(server, model):
    asked = {"session_id": model.session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    session = post(server, "create_sampling_session", **asked)["sampling_session_id"]
    about = server.http.get(f"sessions/{model.session}").json()
    assert (about["training_run_ids"], about["sampler_ids"]) == ([model.id], [session])
    assert model.session in server.http.get("sessions").json()["sessions"]
    body = {"prompt": {"chunks": [{"tokens": [5, 6]}]}, "sampling_params": {"max_tokens": 2, "seed": 0}}
    names = {
        seq_id: post(server, "asample", sampling_session_id=session, seq_id=seq_id, **body)["request_id"]
        for seq_id in (0, 1, 1_000_000_000)  # the last one is of another client of the session
    }
    target, cursor, told = {"sampling_session_id": session}, 0, {}
    while len(told) < 2:
        response = post(server, "retrieve_futures", target=target, prev_cursor=cursor)
        assert response["cursor"] > cursor
        cursor = response["cursor"]
        told |= {one["request_id"]: one for one in response["completions"]}
    assert told.keys() == {names[0], names[1]}
    assert {one["state"] for one in told.values()} == {"finished"}
    content = result(server, {"request_id": names[0]})
    assert len(content) == told[names[0]]["response_payload_uncompressed_size"]
    read = post(server, "retrieve_futures", target=target, prev_cursor=cursor, timeout=0,
                retrieved_request_ids=[names[0], names[1_000_000_000]])  # fmt: skip
    assert read == {"completions": [], "cursor": cursor}
    assert server.http.post("retrieve_future", json={"request_id": names[0]}).status_code == 410  # read, and forgotten
    same = pb.SampleResponse.FromString(result(server, {"request_id": names[1]}))
    assert same.sequences == pb.SampleResponse.FromString(content).sequences  # the same seed
    result(server, {"request_id": names[1_000_000_000]})  # the session's other client has not read it


def test_what_is_refused(server, model):
    http = server.http
    assert http.post("create_session", json={}, headers={"X-API-Key": "sk-1"}).status_code == 401
    assert http.post("session_heartbeat", json={"session_id": "gone"}).status_code == 410
    assert http.post("retrieve_future", json={"request_id": "gone"}).status_code == 410
    wrong = http.post("create_model", json={"session_id": model.session, "model_seq_id": 9, "base_model": "gpt"})
    assert (wrong.status_code, wrong.json()["detail"]) == (
        400,
        "base_model must be 'tiny' or 'other-name', got 'gpt'.",
    )
    wrong = http.post("forward_backward", content=b"\xff\xff", headers=PROTOBUF)
    assert wrong.status_code == 400
    assert "must be a ForwardBackwardRequest" in wrong.json()["detail"]
    wrong = http.post("forward_backward", content=b"x", headers=PROTOBUF | {"content-encoding": "zstd"})
    assert "must be zstd" in wrong.json()["detail"]
    failed = result(server, forward_backward(server, message(model.id, 1, "stable_reinforce")))
    assert failed["category"] == "user"
    assert failed["error"].startswith("loss_fn must be")
    image = message(model.id, 2)
    image.data[0].model_input.add().image.data = b"png"
    wrong = http.post("forward_backward", content=image.SerializeToString(), headers=PROTOBUF)
    assert wrong.json()["detail"] == "data[0].model_input must be encoded_text, got image."


def test_what_clients_ask_for_around_it(server):
    capabilities = server.http.get("get_server_capabilities").json()
    models = capabilities["supported_models"]
    assert "0.38.0" in capabilities["tested_client_versions"]
    assert [one["model_name"] for one in models] == ["tiny", "other-name"]
    assert post(server, "client/config", sdk_version="0.38.0")["proto_compress_fwdbwd"] is True
    assert post(server, "telemetry", events=[]) == {"status": "accepted"}
    assert post(server, "sessions/unknown/finish") == {}
    assert server.http.get("healthz").json() == {"status": "ok"}
