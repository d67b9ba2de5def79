"""What ``toolkit serve`` takes as a model: a folder, a GGUF file, a repository of the Hub's cache."""

import os

import httpx
import pytest
import torch

from tests.helpers.gguf_file import write_gguf
from tests.helpers.server_process import serving

BODY = {"prompt": "the quick brown fox", "max_tokens": 16, "temperature": 0, "logprobs": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(chat_model, tmp_path_factory):
    """A model of Qwen2's architecture with the tokenizer of ``chat_model``."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    torch.manual_seed(3)
    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    path = tmp_path_factory.mktemp("sources") / "qwen"
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def completed(model, *options):
    with serving(model, "--port", "0", *options) as one, httpx.Client(base_url=one.url, timeout=60) as http:
        (card,) = http.get("/v1/models").json()["data"]
        choice = http.post("/v1/completions", json=BODY).raise_for_status().json()["choices"][0]
        return card, choice["text"], choice["logprobs"]["token_logprobs"], "".join(one.errors)


@pytest.fixture(scope="module")
def of_folder(folder):
    return completed(folder, "--max-model-len", "auto", "--num-blocks", "10")


def test_a_folder_is_served_and_the_memory_plan_is_printed(of_folder):
    card, _, _, errors = of_folder
    assert (card["id"], card["max_model_len"]) == ("qwen", 161)
    plan = errors[errors.index("memory plan on cpu, max_model_len 161:\n") :].splitlines()
    assert plan[1].startswith("  weights     0.00 GiB, float32")
    assert plan[2] == "  state       0.00 GiB at most, for 160 tokens in blocks of 16"
    assert plan[4] == "  fits        1 sequence of 161 tokens"


@pytest.mark.sweep
def test_a_gguf_file_is_served_with_the_bits_of_its_folder(folder, of_folder, tmp_path):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "model.gguf"
    write_gguf(path, AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    card, text, logprobs, _ = completed(path)
    assert card["id"] == "model.gguf"
    assert (text, logprobs) == of_folder[1:3]


@pytest.mark.sweep
def test_a_repository_of_the_cache_is_served_by_its_name(folder, of_folder, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--org--qwen"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    os.symlink(folder, repository / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    card, text, logprobs, _ = completed("org/qwen")
    assert card["id"] == "qwen"
    assert (text, logprobs) == of_folder[1:3]
