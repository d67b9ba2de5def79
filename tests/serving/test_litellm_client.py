"""litellm in a separate environment: chats by four of its providers, tools, completions, embeddings, responses."""

import json

import httpx
import pytest

from tests.helpers.client_environments import client_environment, run_script
from tests.helpers.pooling_models import pooling_model
from tests.helpers.server_process import serving
from toolkit.testing.models import tiny_tokenizer

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def found(calling_model, tmp_path_factory):
    """(what the client printed, the texts that the server has for the same requests)."""
    folder = tmp_path_factory.mktemp("litellm")
    python = client_environment(folder, "litellm", ["litellm==1.110.2"])
    pooling_model("qwen3").save_pretrained(folder / "pooled")
    tiny_tokenizer().save_pretrained(folder / "pooled")
    options = ("--port", "0", "--max-model-len", "1024", "--reasoning-parser", "none")
    with (
        serving(calling_model, *options) as server,
        serving(folder / "pooled", "--port", "0", "--runner", "pooling", "--max-model-len", "64") as pooled,
    ):
        chat = {"messages": [{"role": "user", "content": "the quick brown fox"}], "temperature": 0, "max_tokens": 8}
        expected = {
            "chat": httpx.post(f"{server.url}/v1/chat/completions", json=chat).json(),
            "responses": httpx.post(f"{server.url}/v1/chat/completions", json={**chat, "max_tokens": 16}).json(),
            "text": httpx.post(
                f"{server.url}/v1/completions", json={"prompt": "the lazy dog", "temperature": 0, "max_tokens": 8}
            ).json(),
            "embedding": httpx.post(
                f"{pooled.url}/v1/embeddings", json={"input": ["Small random", "a tokenizer"]}
            ).json(),
        }
        said = run_script(
            python, "litellm_calls.py", folder, server.url, pooled.url, LITELLM_LOCAL_MODEL_COST_MAP="True"
        )
    return said, expected


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic", "ollama_chat"])
def test_chats(found, provider):
    said, expected = found
    usage = expected["chat"]["usage"]
    text = expected["chat"]["choices"][0]["message"]["content"]
    assert len(text) >= 8
    assert said[provider] == {
        "text": text, "streamed": text, "built": text, "finish_reason": "length",
        "usage": [usage["prompt_tokens"], usage["completion_tokens"]],
    }  # fmt: skip


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_tools_that_are_required_are_called_and_answered(found, provider):
    said = found[0][f"{provider} tools"]
    ((name, arguments),) = said["calls"]
    assert name == "turn"
    assert said["answered"] == 8
    if provider == "hosted_vllm":  # it leaves additionalProperties out, so the random model writes up to the limit
        assert said["finish_reason"] == "length"
        assert arguments.startswith("{")
        assert said["streamed"] == said["calls"]
        return
    assert said["finish_reason"] == "tool_calls"
    assert json.loads(arguments)["side"] in ("left", "right")
    assert [[one, json.loads(text)] for one, text in said["streamed"]] == [[name, json.loads(arguments)]]


def test_the_other_endpoints(found):
    said, expected = found
    assert said["schema"]["side"] in ("left", "right")
    text = expected["text"]["choices"][0]["text"]
    assert said["completion"] == {"text": text, "streamed": text}
    vectors = [one["embedding"] for one in expected["embedding"]["data"]]
    for provider in ("openai", "hosted_vllm"):
        assert said["embedding"][provider] == [pytest.approx(one, abs=1e-6) for one in vectors]
    chat = expected["chat"]["choices"][0]["message"]["content"]
    # 16 is the least that litellm asks Responses for.
    assert said["responses"] == expected["responses"]["choices"][0]["message"]["content"]
    assert said["at once"] == [chat] * 8
