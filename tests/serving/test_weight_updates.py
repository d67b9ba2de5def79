"""Weights of a folder into a real server process, as trainers send them; token ids in and out."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.routers import free_port
from tests.helpers.server_process import serving
from toolkit.engine import Engine, SamplingParams
from toolkit.engine.weight_group import BUFFER_SIZE, WeightGroup
from toolkit.errors import ToolkitError
from toolkit.loading import load_model

PROMPT = [5, 17, 80, 3, 9, 200, 41, 7, 7, 12, 19, 33, 2, 64, 90, 11, 8]
ONE = {"names": ["model.norm.weight"], "dtype_names": ["float32"], "shapes": [[64]]}
GLOO = {"backend": "gloo", "master_address": "127.0.0.1", "master_port": 1}
SAMPLING = {"temperature": 1.0, "seed": 7, "max_tokens": 24, "logprobs": 0, "ignore_eos": True}


def saved(folder, chat_model, seed, **changes):
    """Another checkpoint of the served model's architecture."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(chat_model)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(chat_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    one = saved(root / "one", chat_model, 11)
    two = saved(root / "two", chat_model, 12)
    for name in ("config.json", "generation_config.json"):  # as trainers leave it
        (two / name).unlink()
    return SimpleNamespace(root=root, start=chat_model, one=one, two=two)


@pytest.fixture(scope="module")
def server(chat_model):
    options = ("--port", "0", "--enable-admin-endpoints", "--max-num-seqs", "8")
    with serving(chat_model, *options) as one, httpx.Client(base_url=one.url, timeout=60) as http:
        yield SimpleNamespace(http=http, url=one.url)


@pytest.fixture(scope="module")
def fresh(folders, chat_model):
    """(token ids, logprobs) of a new engine on the weights of a folder."""

    def of(folder, prompt=PROMPT):
        whole = folder
        if not (folder / "config.json").is_file():
            whole = folders.root / f"whole-{folder.name}"
            if not whole.exists():
                shutil.copytree(folder, whole)
                shutil.copy(chat_model / "config.json", whole)
        with Engine(load_model(str(whole))[0]) as engine:
            (completion,) = engine.generate([prompt], SamplingParams(**SAMPLING))
        return completion.token_ids, completion.logprobs

    return of


def generate(http, **fields):
    body = {"token_ids": PROMPT, "sampling_params": SAMPLING, **fields}
    return http.post("/inference/v1/generate", json=body).raise_for_status()


def bits(response):
    (choice,) = response.json()["choices"]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [f"token_id:{token}" for token in choice["token_ids"]]
    return choice["token_ids"], [entry["logprob"] for entry in entries]


def update(http, folder, **body):
    return http.post("/update_weights", json=body or {"weight_dir": str(folder)})


def version(http):
    return http.get("/v1/models").json()["data"][0]["weight_version"]


def generated_tokens(http):
    lines = http.get("/metrics").text.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("toolkit:generation_tokens_total "))


def until_it_generates(http, before):
    """Wait until more than ``before`` tokens have been generated."""
    end = time.monotonic() + 30
    while generated_tokens(http) <= before and time.monotonic() < end:
        time.sleep(0.002)
    assert generated_tokens(http) > before


def same_bits(found, expected):
    assert found[0] == expected[0]
    assert torch.equal(torch.tensor(found[1], dtype=torch.float64), torch.tensor(expected[1], dtype=torch.float64))


def test_after_an_update_the_bits_are_those_of_a_new_engine_on_the_weights(server, folders, fresh):
    same_bits(bits(generate(server.http)), fresh(folders.start))  # and its prefix is cached now
    seen = [version(server.http)]
    for folder, body in (
        (folders.one, {"weight_dir": str(folders.one)}),
        (folders.two, {"model_path": str(folders.two)}),
        (folders.start, {"update_info": {"weight_dir": str(folders.start)}}),
    ):
        updated = update(server.http, folder, **body).raise_for_status().json()
        assert (updated["status"], updated["message"]) == ("ok", "Weights updated")
        seen.append(updated["weight_version"])
        assert version(server.http) == seen[-1]
        response = generate(server.http)
        same_bits(bits(response), fresh(folder))
        choice = response.json()["choices"][0]
        assert set(choice["weight_versions"]) == {seen[-1]}
        assert response.json()["weight_version"] == seen[-1]
        assert response.headers["x-weight-version"] == str(seen[-1])
        text = server.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2})
        assert text.headers["x-weight-version"] == str(seen[-1])
    assert len(set(seen)) == 4


def test_weights_that_change_while_requests_run_are_told_apart_token_by_token(server, folders, fresh):
    update(server.http, folders.start).raise_for_status()
    old = version(server.http)
    sampling = {**SAMPLING, "max_tokens": 600, "temperature": 0.0}
    found = []
    body = {"token_ids": PROMPT, "sampling_params": sampling}
    running = threading.Thread(
        target=lambda: found.append(server.http.post("/inference/v1/generate", json=body).json()["choices"][0])
    )
    before = generated_tokens(server.http)
    running.start()
    until_it_generates(server.http, before)
    server.http.post("/pause", params={"mode": "keep", "clear_cache": "false"}).raise_for_status()  # as prime-rl does
    update(server.http, folders.one).raise_for_status()
    server.http.post("/resume").raise_for_status()
    running.join(60)
    versions = found[0]["weight_versions"]
    assert len(versions) == 600
    assert versions == sorted(versions)
    assert set(versions) == {old, version(server.http)}
    same_bits(bits(generate(server.http)), fresh(folders.one))
    whole = [*PROMPT, *found[0]["token_ids"]]  # its state is of both weights, and is not hit
    same_bits(bits(generate(server.http, token_ids=whole)), fresh(folders.one, whole))


def broken(folders, kind):
    """A folder with weights that do not fit."""
    from safetensors.torch import load_file, save_file

    folder = folders.root / kind
    if kind == "none":
        return folder
    if kind == "config":
        return saved(folder, folders.start, 13, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    shutil.copytree(folders.one, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing":
        del tensors[last]
    elif kind == "shape":
        tensors[last] = tensors[last][:-1].clone()
    elif kind == "dtype":
        tensors[last] = tensors[last].to(torch.int8)
    elif kind == "pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
        file.unlink()
        return folder
    save_file(tensors, file, metadata={"format": "pt"})
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "weight_dir must be a folder that this server can read, got "),
        ("config", "weight_dir must have a config.json with rope_parameters {"),
        ("missing", "lack 'model.layers.1.mlp.up_proj.weight'"),
        ("shape", "weight_dir must have model.layers.1.mlp.up_proj.weight of the shape [128, 64], got [127, 64]."),
        ("dtype", "model.layers.1.mlp.up_proj.weight of a dtype among F64, F32, F16, BF16, got I8."),
        ("pickled", "pickled weights are not loaded"),
        ("cut", "is not a whole safetensors file"),
    ],
)
def test_a_folder_that_does_not_fit_changes_nothing(server, folders, kind, words):
    before, number = bits(generate(server.http)), version(server.http)
    refused = update(server.http, broken(folders, kind))
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert words in message
    assert message.endswith(".")
    assert version(server.http) == number
    same_bits(bits(generate(server.http)), before)
    assert server.http.get("/is_paused").json() == {"is_paused": False}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/update_weights", {}, 400, "'weight_dir' must be given, and nothing else names weights, got none."),
        ("/update_weights", {"weight_dir": "a", "model_path": "b"}, 400, "got weight_dir, model_path."),
        ("/update_weights", {"update_info": {"names": []}}, 400, "'update_info.names' must be a list of at least 1"),
        ("/update_weights", {"update_info": {**ONE, "shapes": []}}, 400, "'shapes' must have 1 items, as 'names' has"),
        ("/update_weights", {"update_info": {**ONE, "dtype_names": ["int8"]}}, 400, "'update_info.dtype_names[0]'"),
        ("/update_weights", {"update_info": ONE}, 409, 'or POST /update_weights {"weight_dir": "FOLDER"}.'),
        ("/update_weights", {"update_info": {"ipc_handles_pickled": ""}}, 501, "receives no tensors over NCCL"),
        ("/update_weights", {"update_info": {"mood": 1}}, 400, "'update_info' must have 'weight_dir' alone"),
        ("/update_weights", {"update_info": {"weight_dir": 1}}, 400, "'update_info.weight_dir' must be text, got 1."),
        ("/update_weights", {"weights": "a"}, 400, "'weights'"),
        ("/start_weight_update", {"is_checkpoint_format": False}, 400, "'is_checkpoint_format' must be true"),
        ("/init_weight_transfer_engine", {}, 400, "'init_info' is required"),
        ("/init_weight_transfer_engine", {"init_info": {"master_port": 1}}, 501, "receives no tensors over NCCL"),
        ("/init_weight_transfer_engine", {"init_info": {"backend": "gloo"}}, 400, "'init_info.master_address' is req"),
        (
            "/init_weight_transfer_engine",
            {"init_info": {**GLOO, "rank_offset": 2}},
            400,
            "must be < 'world_size', got",
        ),
    ],
)
def test_updates_that_are_not_offered_say_what_is(server, path, body, status, words):
    refused = server.http.post(path, json=body)
    assert refused.status_code == status
    assert words in refused.json()["error"]["message"]


def test_a_trainer_of_other_numerics_is_refused_with_the_part_that_differs(server):
    info = server.http.get("/server_info").json()
    ours = info["numerics_fingerprint"]
    assert (ours["numerics"], ours["dtype"], ours["device"]) == ("bitwise", "float32", "cpu")
    assert ours["torch"] == torch.__version__
    assert ours["instructions"] == torch.backends.cpu.get_cpu_capability().lower()
    line = "; ".join(f"{name}={value}" for name, value in ours.items())
    generate(server.http)
    body = {"token_ids": PROMPT, "sampling_params": SAMPLING}
    for path in ("/inference/v1/generate", "/v1/completions"):
        fields = body if path.startswith("/inf") else {"prompt": PROMPT}
        assert server.http.post(path, json=fields, headers={"x-numerics-fingerprint": line}).status_code == 200
        other = line.replace(f"torch={torch.__version__}", "torch=2.11.0")
        refused = server.http.post(path, json=fields, headers={"x-numerics-fingerprint": other})
        assert refused.status_code == 412
        assert refused.json()["error"] == {
            "message": f"x-numerics-fingerprint must have torch '{torch.__version__}', as this server has in bitwise "
            "mode, got '2.11.0'.",
            "type": "invalid_request_error",
            "param": "x-numerics-fingerprint",
            "code": "numerics_mismatch",
        }
    wrong = server.http.post("/v1/completions", json={"prompt": PROMPT}, headers={"x-numerics-fingerprint": "torch"})
    assert wrong.status_code == 400

    def initialise(fingerprint):
        init_info = {"backend": "folder", "numerics_fingerprint": fingerprint}
        return server.http.post("/init_weight_transfer_engine", json={"init_info": init_info})

    assert initialise(ours).status_code == initialise(line).status_code == 200
    assert initialise({**ours, "dtype": "bfloat16"}).status_code == 412
    missing = initialise({name: value for name, value in ours.items() if name != "native"})
    assert "init_info.numerics_fingerprint must have native" in missing.json()["error"]["message"]
    assert missing.json()["error"]["message"].endswith("got none.")
    more = initialise({**ours, "triton": "3.6"}).json()["error"]["message"]
    assert "must have no triton, as this server has in bitwise mode, got '3.6'." in more


class Trainer:
    """A process that sends weights to the server over gloo."""

    def __init__(self, http, **info):
        port, self.http = free_port(), http
        given = {**GLOO, "master_port": port, **info}
        with self.meanwhile("/init_weight_transfer_engine", init_info=given) as response:
            size = info.get("packed_buffer_size_bytes", BUFFER_SIZE) if info.get("packed", True) else 0
            self.group = WeightGroup("127.0.0.1", port, 0, 2, size)
        assert response.result().status_code == 200

    @contextmanager
    def meanwhile(self, path, **body):
        with ThreadPoolExecutor(1) as threads:
            yield threads.submit(self.http.post, path, json=body)

    def send(self, tensors, check=lambda response: None, **changes):
        info = {
            "names": list(tensors), "dtype_names": [str(one.dtype).removeprefix("torch.") for one in tensors.values()],
            "shapes": [list(one.shape) for one in tensors.values()], **changes,
        }  # fmt: skip
        with self.meanwhile("/update_weights", update_info=info) as response:
            self.group.send(iter(tensors.values()), lambda: check(response))
        return response.result()


def refused(response):
    if response.done():
        raise ToolkitError(response.result().json()["error"]["message"])


@pytest.mark.parametrize(
    "info", [{"packed_buffer_size_bytes": 3000}, pytest.param({"packed": False}, marks=pytest.mark.sweep)]
)
def test_tensors_that_come_over_a_group_give_the_bits_of_their_folder(server, folders, fresh, info):
    trainer, before = Trainer(server.http, **info), version(server.http)
    for count, folder in enumerate((folders.one, folders.two), 1):
        sent = trainer.send(load_file(folder / "model.safetensors"))
        assert (sent.status_code, sent.json()["weight_version"]) == (200, before + count)
        same_bits(bits(generate(server.http)), fresh(folder))
    norm = {"model.norm.weight": torch.linspace(0.5, 2, 64)}
    assert trainer.send(norm).status_code == 200  # what is not sent stays
    mixed = folders.root / f"mixed-{len(info)}-{info.get('packed')}"
    mixed.mkdir()
    save_file({**load_file(folders.two / "model.safetensors"), **norm}, mixed / "model.safetensors", {"format": "pt"})
    same_bits(bits(generate(server.http)), fresh(mixed))


@pytest.mark.sweep
def test_tensors_that_do_not_fit_change_nothing_and_end_the_group(server, folders, fresh):
    assert update(server.http, folders.start).status_code == 200
    for tensors, words in (
        ({"model.norm.weight": torch.ones(65)}, r"model.norm.weight must have the shape \[64\], got \[65\]\."),
        ({"lm_head": torch.ones(64)}, "tensors of the served model only, got lm_head"),
    ):
        trainer, number = Trainer(server.http), version(server.http)
        with pytest.raises(ToolkitError, match=words):
            trainer.send(tensors, refused)
        assert server.http.post("/update_weights", json={"update_info": ONE}).status_code == 409
        assert version(server.http) == number
        same_bits(bits(generate(server.http)), fresh(folders.start))
    trainer = Trainer(server.http)
    with trainer.meanwhile("/update_weights", update_info=ONE) as response:
        trainer.group = None  # and its store, as when a process ends
    assert "the other process ended or fell silent" in response.result().json()["error"]["message"]


def test_the_model_is_described_to_clients_of_other_servers(server, chat_model):
    info = server.http.get("/get_model_info").json()
    assert info["model_path"] == str(chat_model)
    assert (info["is_generation"], info["max_model_len"], info["dtype"]) == (True, 4096, "float32")
    assert info["weight_version"] == version(server.http)
    props = server.http.get("/props").json()
    assert props["total_slots"] == 8
    assert props["default_generation_settings"]["n_ctx"] == 4096
    assert props["default_generation_settings"]["params"]["temperature"] == 1.0
    assert "{% for m in messages %}" in props["chat_template"]
    assert props["modalities"] == {"vision": False, "audio": False}


def test_tokens_are_streamed_and_their_ends_say_which_weights_sampled_them(server):
    (whole,) = generate(server.http).json()["choices"]
    events = []
    body = {"token_ids": PROMPT, "sampling_params": {**SAMPLING, "n": 2}, "stream": True, "request_id": "mine"}
    body["stream_options"] = {"include_usage": True}
    with server.http.stream("POST", "/inference/v1/generate", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {one["request_id"] for one in events} == {"mine"}
    choices = [choice for one in events for choice in one["choices"] if choice["index"] == 0]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    found = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert found == whole["logprobs"]["content"]
    assert choices[-1]["weight_versions"] == whole["weight_versions"]
    assert choices[-1]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 2 * SAMPLING["max_tokens"]


def test_an_aborted_request_keeps_its_tokens(server):
    found = []
    body = {"token_ids": PROMPT, "sampling_params": {**SAMPLING, "max_tokens": 3000}, "request_id": "long"}
    running = threading.Thread(target=lambda: found.append(server.http.post("/inference/v1/generate", json=body)))
    before = generated_tokens(server.http)
    running.start()
    until_it_generates(server.http, before)
    aborted = server.http.post("/abort_requests", json={"request_ids": ["long"]}).json()
    assert aborted == {"num_aborted": 1}
    running.join(60)
    (choice,) = found[0].json()["choices"]
    assert choice["finish_reason"] == "abort"
    assert 0 < len(choice["token_ids"]) < 3000


def test_prompt_logprobs_and_alternatives_are_by_token_id(server):
    sampling = {**SAMPLING, "max_tokens": 2, "logprobs": 2, "prompt_logprobs": 1}
    body = generate(server.http, sampling_params=sampling).json()
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == len(PROMPT)
    assert all(str(token) in entry for token, entry in zip(PROMPT[1:], body["prompt_logprobs"][1:], strict=True))
    for entry in body["choices"][0]["logprobs"]["content"]:
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 2
        assert tops == sorted(tops, reverse=True)
    assert body["usage"]["prompt_tokens"] == len(PROMPT)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"token_ids": []}, "'token_ids' must be a list of at least 1"),
        ({"token_ids": [10**6]}, "'token_ids' must have token ids from 0 to"),
        ({"sampling_params": {"mood": 1}}, "mood"),
        ({"sampling_params": {"stream": True}}, "'sampling_params' must have no 'stream'."),
        ({"sampling_params": {"temperature": -1}}, "'sampling_params.temperature' must be"),
        ({"stream_options": {}}, "'stream_options' is given, but 'stream' is not true."),
        ({"model": "other"}, "'model' must be 'tiny', got 'other'."),
    ],
)
def test_a_wrong_request_for_tokens_is_one_sentence(server, fields, words):
    body = {"token_ids": PROMPT, "sampling_params": {}, **fields}
    refused = server.http.post("/inference/v1/generate", json=body)
    assert refused.status_code in (400, 404)
    assert words in refused.json()["error"]["message"]


@pytest.fixture
def client(server):
    """TRL's own client."""
    client_module = pytest.importorskip("trl.experimental.async_grpo.vllm_client")
    accelerate = pytest.importorskip("accelerate")
    if not accelerate.PartialState._shared_state:  # its logger asks for it
        accelerate.PartialState(cpu=True)
    return client_module.VLLMClient(server.url, server_timeout=10)


def test_trl_s_own_client_drives_the_server(server, folders, fresh, client):
    client.wait_for_server_ready()
    assert client.get_max_model_len() == 4096
    assert client.get_dtype() == "torch.float32"
    info = client.get_server_info()
    assert info["lora_config"] is None
    assert info["weight_transfer_config"] is None
    assert info["parallel_config"]["data_parallel_size"] == 1
    assert client.get_world_size() == 1
    client.init_weight_transfer_engine({"backend": "folder"})
    client.pause()
    client.start_weight_update()
    client.update_weights({"weight_dir": str(folders.two)})
    client.finish_weight_update()
    client.resume()
    same_bits(bits(generate(server.http)), fresh(folders.two))
    with pytest.raises(Exception, match="receives no tensors over NCCL"):
        client.init_weight_transfer_engine({"master_address": "x", "master_port": 1, "rank_offset": 1, "world_size": 2})
    with pytest.raises(Exception, match="There is no group to receive tensors from"):
        client.update_weights(ONE)


def test_trl_s_weight_transfer_through_a_folder(server, folders, fresh, client, tmp_path):
    """The calls of AsyncGRPOTrainer, in its order, with the names that it sends."""
    from transformers import AutoModelForCausalLM
    from trl.experimental.async_grpo.async_grpo_trainer import _iter_vllm_named_params

    from train_patches.trl_async import FolderWeightTransfer

    ours = client.get_server_info() and server.http.get("/server_info").json()["numerics_fingerprint"]
    transfer = FolderWeightTransfer(client, tmp_path / "policy", numerics_fingerprint=ours)
    transfer.init_weight_transfer()
    for folder in (folders.one, folders.start):
        model = AutoModelForCausalLM.from_pretrained(folder)
        transfer.pause()
        transfer.send_weights((name, parameter.detach()) for name, parameter in _iter_vllm_named_params(model))
        transfer.resume()
        same_bits(bits(generate(server.http)), fresh(folder))
        assert len(list((tmp_path / "policy").iterdir())) == 1
    number, before = version(server.http), bits(generate(server.http))
    with pytest.raises(Exception, match="lack"):  # the parameters that are not trained are not sent
        transfer.send_weights(iter([("model.norm.weight", torch.ones(64))]))
    assert version(server.http) == number
    same_bits(bits(generate(server.http)), before)
    transfer.destroy()
    other = FolderWeightTransfer(client, tmp_path, numerics_fingerprint={**ours, "torch": "2.11.0"})
    with pytest.raises(Exception, match=r"init_info\.numerics_fingerprint must have torch"):
        other.init_weight_transfer()
