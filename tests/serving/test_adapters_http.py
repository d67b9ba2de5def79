"""Adapters of a real server process: named as the model, loaded, replaced and unloaded while it runs."""

import threading
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.adapter_folders import save_adapter
from tests.helpers.server_process import serving
from toolkit import LLM, LoRARequest, SamplingParams
from toolkit.loading import load_model

peft = pytest.importorskip("peft")
PROMPT = [5, 17, 80, 3, 9, 200, 41, 7]
KEYS = ("--api-key", "user", "--admin-api-key", "admin")
ADMIN = {"authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def folders(chat_model, tmp_path_factory):
    model = load_model(str(chat_model))[0]
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(model, root / name, seed, rank=2 + seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def server(chat_model, folders):
    options = ("--port", "0", *KEYS, "--lora-modules", f"one={folders['one']}", "--enable-lora", "--max-loras", "1")
    with serving(chat_model, *options) as one, httpx.Client(base_url=one.url, timeout=60, headers=ADMIN) as admin:
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="user", max_retries=0)
        yield SimpleNamespace(client=client, admin=admin, url=one.url)


@pytest.fixture(scope="module")
def expected(chat_model, folders):
    """Token ids in process, by adapter."""
    llm = LLM(str(chat_model))
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    requests = [None, *(LoRARequest(name, 1, str(folder)) for name, folder in folders.items())]
    found = llm.generate([{"prompt_token_ids": PROMPT}] * 3, params, lora_request=requests)
    alone = llm.generate([{"prompt_token_ids": PROMPT}], params, lora_request=LoRARequest("two"))
    assert alone[0].outputs[0].token_ids == found[2].outputs[0].token_ids
    texts = [one.outputs[0].token_ids for one in found]
    assert len({tuple(one) for one in texts}) == 3
    llm.close()
    return dict(zip((None, "one", "two"), texts))


def generated(server, model):
    response = server.client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert response.model == model
    return response.choices[0].token_ids


def cards(server):
    return {one.id: (one.parent, one.root) for one in server.client.models.list().data}


def test_adapters_are_models_that_come_and_go(server, folders, expected):
    base = server.client.models.list().data[0].id
    assert cards(server) == {base: (None, base), "one": (base, str(folders["one"]))}
    assert server.client.models.retrieve("one").parent == base
    assert generated(server, base) == expected[None]
    assert generated(server, "one") == expected["one"]
    with pytest.raises(openai.NotFoundError, match="'model' must be"):
        generated(server, "two")
    load = {"lora_name": "two", "lora_path": str(folders["two"])}
    refused = httpx.post(f"{server.url}/v1/load_lora_adapter", json=load, headers={"authorization": "Bearer user"})
    assert refused.status_code == 401
    assert server.admin.post("/v1/load_lora_adapter", json=load).json() == {"status": "loaded"}
    chat = server.client.chat.completions.create(
        model="two", messages=[{"role": "user", "content": "x"}], max_tokens=2, extra_body={"ignore_eos": True}
    )
    assert chat.model == "two"
    assert generated(server, "two") == expected["two"]
    assert generated(server, "one") == expected["one"]  # it had to make room, and is there again
    again = server.admin.post("/v1/load_lora_adapter", json=load)
    assert again.status_code == 400
    assert again.json()["error"]["param"] == "lora_name"
    for wrong, field, status in (
        ({"lora_name": "x", "lora_path": "/nowhere"}, "lora_path", 404),  # on which prime-rl asks again
        ({"lora_name": base, "lora_path": str(folders["two"])}, "lora_name", 400),
        ({"lora_name": "x"}, "lora_path", 400),
        ({**load, "unknown": 1}, "unknown", 400),
    ):
        response = server.admin.post("/v1/load_lora_adapter", json=wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (status, field)
    assert server.admin.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).json() == {"status": "unloaded"}
    assert server.admin.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 404
    with pytest.raises(openai.NotFoundError):
        generated(server, "two")


def test_swaps_under_load_lose_nothing(server, folders, expected):
    base = server.client.models.list().data[0].id
    wrong = []

    def ask(name):
        for _ in range(6):
            found = generated(server, name or base)
            if found != expected[name]:
                wrong.append((name, found))

    threads = [threading.Thread(target=ask, args=(name,)) for name in (None, "one", "one")]
    for one in threads:
        one.start()
    for at in range(4):
        load = {"lora_name": f"v{at}.2", "lora_path": str(folders["two"])}
        assert server.admin.post("/v1/load_lora_adapter", json=load).status_code == 200
        assert generated(server, f"v{at}.2") == expected["two"]
        replaced = {**load, "lora_path": str(folders["one"])}
        path, more = ("/load_lora_adapter", {}) if at % 2 else ("/v1/load_lora_adapter", {"load_inplace": True})
        assert server.admin.post(path, json={**replaced, **more}).status_code == 200
        assert generated(server, f"v{at}.2") == expected["one"]
        assert server.admin.post("/v1/unload_lora_adapter", json={"lora_name": f"v{at}.2"}).status_code == 200
    for one in threads:
        one.join(60)
    assert not wrong


def test_the_base_model_is_exported_while_adapters_are_loaded(server, chat_model, tmp_path):
    generated(server, "one")
    body = {"path": str(tmp_path / "out"), "to": "hf"}
    exported = server.admin.post("/export", json=body).raise_for_status().json()
    assert exported == {**body, "weight_version": exported["weight_version"]}
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", chat_model))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert generated(server, "one") != generated(server, "tiny")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"to": "hf"}, "path", "path must be a new or empty folder"),
        ({"path": "new", "to": "tflite"}, "to", "to must be one of aot-inductor, compressed-tensors,"),
        ({"path": "new", "to": "gguf", "quantise": "q3"}, "quantise", "quantise must be one of f32, bf16"),
        ({"path": "new", "to": "peft"}, "path", "'peft'"),
    ],
)
def test_what_is_not_exported_is_a_sentence(server, tmp_path, body, param, message):
    (tmp_path / "file").touch()
    given = {**body, "path": str(tmp_path / body.get("path", ""))}
    response = server.admin.post("/export", json=given)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert message in response.json()["error"]["message"]
    assert not (tmp_path / "new").exists()
