"""TRL's whole AsyncGRPOTrainer in an environment with aiohttp, against a server process."""

import httpx
import pytest
import torch

from tests.helpers.client_environments import ROOT, client_environment, run_script
from tests.helpers.server_process import serving
from tests.serving.conftest import chat_model, talking_model  # noqa: F401
from toolkit.loading import load_model

STEPS = 3


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_rollouts_come_from_the_weights_that_were_trained(talking_model, tmp_path):  # noqa: F811
    """The server's weights after the last update are those of the trainer."""
    pytest.importorskip("trl")
    python = client_environment(tmp_path, "async-grpo", ["aiohttp"], beside=True)
    options = ("--port", "0", "--enable-admin-endpoints", "--max-model-len", "256", "--max-num-seqs", "16")
    with serving(talking_model, *options, "--served-model-name", str(talking_model)) as server:
        before = httpx.get(f"{server.url}/v1/models").json()["data"][0]["weight_version"]
        found = run_script(
            python, "async_grpo.py", tmp_path, server.url, str(talking_model), str(tmp_path), str(STEPS),
            PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
        assert found["steps"] == STEPS
        after = httpx.get(f"{server.url}/v1/models").json()["data"][0]["weight_version"]
        assert after - before >= STEPS
        body = {"prompt": [5, 17, 80, 3], "max_tokens": 16, "temperature": 0, "logprobs": 0, "return_token_ids": True}
        choice = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]
    trained, _ = load_model(str(tmp_path / "trained"))
    start, _ = load_model(str(talking_model))
    assert any(not torch.equal(one, other) for one, other in zip(trained.parameters(), start.parameters(), strict=True))
    ids = torch.tensor([[*body["prompt"], *choice["token_ids"]]])
    with torch.no_grad():
        logprobs = trained(ids).logits.double().log_softmax(-1)[0, 3:-1]
    wanted = logprobs.gather(1, ids[0, 4:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(choice["logprobs"]["token_logprobs"]).double(), wanted, atol=1e-4, rtol=0)
