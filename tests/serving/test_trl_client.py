"""TRL's own VLLMClient, as GRPOTrainer's server mode uses it, against a real server; only its look for vLLM's package
is replaced."""

import json

import pytest
import torch

from tests.helpers.routers import free_port
from tests.helpers.server_process import serving
from toolkit import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model, tiny_tokenizer

vllm_client = pytest.importorskip("trl.generation.vllm_client")

pytestmark = pytest.mark.sweep
IDS = [[5, 6, 7], [8, 9]]
CHATS = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "you"}]]


def saved_model(folder):
    """A random model with a chat template whose replies TRL reads."""
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    model = random_model("llama", vocabulary=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(model):
    options = ("--port", "0", "--enable-admin-endpoints", "--max-model-len", "1024")
    with serving(model, *options) as one:
        yield one


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *_, **__: True)
    return vllm_client.VLLMClient(server.url)


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def lengths(lists):
    return [len(one) for one in lists]


def test_it_generates_with_all_that_its_methods_take(client, model):
    with Engine(loaded(model)) as engine:
        params = SamplingParams(n=2, max_tokens=4, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=7, logprobs=3)
        expected = engine.generate(IDS, params)
    found = client.generate(
        IDS, n=2, max_tokens=4, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, logprobs=3,
        generation_kwargs={"seed": 7},
    )  # fmt: skip
    assert found["prompt_ids"] == IDS
    assert found["completion_ids"] == [one.token_ids for one in expected]
    for one, tokens, values in zip(expected, found["logprob_token_ids"], found["logprobs"], strict=True):
        for at, (token, best) in enumerate(zip(one.token_ids, one.top_logprobs, strict=True)):
            pairs = {**best, token: one.logprobs[at]}
            assert dict(zip(tokens[at], values[at], strict=True)) == pairs
            assert values[at] == sorted(values[at], reverse=True)
    texts = client.generate(["hello", "a b"], repetition_penalty=1.2, max_tokens=3, logprobs=None)
    assert (lengths(texts["completion_ids"]), texts["logprobs"]) == ([3, 3], None)
    client.reset_prefix_cache()
    formed = client.generate(IDS, max_tokens=8, structured_outputs_regex="[ab]{3}")
    assert lengths(formed["completion_ids"]) == [4, 4]  # and the end


def test_it_chats_with_tools_and_forms(client):
    def add(a: int) -> int:
        """Add.

        Args:
            a: what to add to.

        Returns:
            The sum.
        """
        return a

    plain = client.chat(CHATS, n=2, max_tokens=4, logprobs=2)
    assert lengths(plain["completion_ids"]) == [4] * 4
    assert {len(best) for one in plain["logprobs"] for best in one} <= {2, 3}
    found = client.chat(
        CHATS, max_tokens=9, tools=[add], chat_template_kwargs={"enable_thinking": False},
        structured_outputs_regex="[ab]{3}",
    )  # fmt: skip
    assert lengths(found["completion_ids"]) == [4, 4]
    assert all(long > short for long, short in zip(lengths(found["prompt_ids"]), lengths(plain["prompt_ids"])))


def test_it_scores_sequences(client, model):
    sequences, prompts = [[5, 6, 7, 8, 9, 3], [9, 10, 11]], [2, 1]
    found = client.get_sequence_logprobs(sequences, prompts, top_logprobs=5, chunk_size=1)
    stock = loaded(model).double()
    for at, (sequence, start) in enumerate(zip(sequences, prompts, strict=True)):
        with torch.no_grad():
            expected = stock(torch.tensor([sequence])).logits[0, start - 1 : -1].log_softmax(-1)
        best = expected.topk(5)
        assert found["logprob_token_ids"][at] == best.indices.tolist()
        assert (torch.tensor(found["logprobs"][at]).double() - best.values).abs().max() < 1e-4
        own = torch.tensor(found["actual_logprobs"][at]).double().squeeze(1)
        asked = expected.gather(1, torch.tensor(sequence[start:])[:, None]).squeeze(1)
        assert (own - asked).abs().max() < 1e-4


def test_without_a_patch_it_says_that_weights_do_not_come(client):
    assert client.get_world_size() == 1
    with pytest.raises(RuntimeError, match="has no weight-transfer engine"):
        client.init_communicator(device="cuda")
    client.close_communicator()


def test_weights_go_over_gloo_and_the_bits_are_those_of_the_trainer(server, model):
    trl_server = pytest.importorskip("train_patches.trl_server")
    from trl.generation import vllm_generation

    from toolkit import patch, token_logprobs
    from toolkit.engine.fingerprint import model_fingerprint

    own = vllm_generation.VLLMClient
    trainer = loaded(model)
    patch(trainer)
    fingerprint = model_fingerprint(trainer)
    with trl_server.server_rollout({**fingerprint, "torch": "2.0"}):
        other = vllm_generation.VLLMClient(server.url, group_port=free_port())
    with pytest.raises(ToolkitError, match=r"refused /init_weight_transfer_engine: init_info.numerics_fing"):
        other.init_communicator("cpu")
    with trl_server.server_rollout(fingerprint):
        client = vllm_generation.VLLMClient(server.url, group_port=free_port())
    assert vllm_generation.VLLMClient is own
    client.init_communicator("cpu")
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        client.update_model_params(trainer)
        found = client.generate(IDS, n=2, max_tokens=6, logprobs=0)
        sequences = [IDS[at // 2] + ids for at, ids in enumerate(found["completion_ids"])]
        with torch.no_grad():
            expected = token_logprobs(trainer, sequences)
        for ids, served, trained in zip(found["completion_ids"], found["logprobs"], expected, strict=True):
            assert torch.equal(torch.tensor(served).squeeze(1), trained[-len(ids) :])
    with client.weight_update():
        client.update_named_param("model.norm.weight", torch.ones(trainer.config.hidden_size))
    with pytest.raises(ToolkitError, match=r"refused /update_weights: model.norm.weight must have the shape"):
        client.update_named_param("model.norm.weight", torch.ones(3))
    client.close_communicator()
    with pytest.raises(ToolkitError, match="init_communicator"):
        client.update_model_params(trainer)


def test_log_probabilities_are_of_the_sampled_distribution(server, model):
    trl_server = pytest.importorskip("train_patches.trl_server")
    from trl.generation import vllm_generation

    with trl_server.server_rollout():
        client = vllm_generation.VLLMClient(server.url)
    assert client.get_server_info()["model_config"]["logprobs_mode"] == "processed_logprobs"
    asked = {"max_tokens": 5, "temperature": 0.6, "top_k": 7, "generation_kwargs": {"seed": 3}}
    found, with_top = client.generate(IDS, **asked), client.generate(IDS, logprobs=2, **asked)
    assert found["completion_ids"] == with_top["completion_ids"]
    body = {"prompt": IDS[0], "max_tokens": 5, "temperature": 0.6, "top_k": 7, "seed": 3, "logprobs": 0}
    response = client.session.post(f"{server.url}/v1/completions", json={**body, "return_sampling_logprobs": True})
    (choice,) = json.loads(response.text)["choices"]
    assert [one for (one,) in found["logprobs"][0]] == choice["sampling_logprobs"]
    assert choice["sampling_logprobs"] != choice["logprobs"]["token_logprobs"]
