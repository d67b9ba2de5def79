"""inspect-ai in a separate environment: an evaluation by three of its providers, and one with a tool."""

import httpx
import pytest

from tests.helpers.client_environments import client_environment, run_script
from tests.helpers.server_process import serving

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def found(calling_model, tmp_path_factory):
    """(what the client printed, the server's own response to its request)."""
    folder = tmp_path_factory.mktemp("inspect")
    python = client_environment(folder, "inspect-ai", ["inspect-ai==0.3.285", "openai==3.57.0"])
    with serving(calling_model, "--port", "0", "--max-model-len", "1024", "--reasoning-parser", "none") as server:
        chat = {"messages": [{"role": "user", "content": "the quick brown fox"}], "temperature": 0, "max_tokens": 8}
        expected = httpx.post(f"{server.url}/v1/chat/completions", json=chat).json()
        text = expected["choices"][0]["message"]["content"]
        return run_script(python, "inspect_ai_task.py", folder, server.url, text), expected


@pytest.mark.parametrize("provider", ["openai-api/toolkit", "vllm", "openai"])
def test_scores_and_texts(found, provider):
    said, expected = found
    usage = expected["usage"]
    text = expected["choices"][0]["message"]["content"]
    assert len(text) >= 8
    assert said[provider]["texts"] == [text, text]
    assert said[provider]["accuracy"] == 0.5
    assert said[provider]["usage"] == [[usage["prompt_tokens"], usage["completion_tokens"]]] * 2


def test_a_tool_is_called_and_its_result_goes_back(found):
    ((name, text, error),) = found[0]["tool"]
    assert name == "turn"
    assert error is None
    assert text.startswith("turned ")
