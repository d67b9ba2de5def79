"""A trainer in the manner of prime-rl against a real server: token ids out, folders of weights in, one step behind."""

from collections import deque
from typing import Any

import httpx
import pytest
import torch

import toolkit
from tests.helpers.server_process import serving
from toolkit.loading import load_model
from toolkit.loading.weight_folders import WeightFolders

STEPS, GROUP, COMPLETION = 4, 4, 8


def rollout(http: httpx.Client, step: int) -> list[dict[str, Any]]:
    """Samples of a prompt under the weights of now."""
    prompt = [5 + step, 17, 80, 3, 9]
    sampling = {
        "temperature": 1.0,
        "seed": step,
        "max_tokens": COMPLETION,
        "ignore_eos": True,
        "logprobs": 0,
        "n": GROUP,
    }
    body = {"token_ids": prompt, "sampling_params": sampling}
    choices = http.post("/inference/v1/generate", json=body).raise_for_status().json()["choices"]
    return [
        {
            "sequence": [*prompt, *one["token_ids"]],
            "logprobs": [entry["logprob"] for entry in one["logprobs"]["content"]],
            "versions": set(one["weight_versions"]),
            "reward": sum(token % 2 == 0 for token in one["token_ids"]) / COMPLETION,
        }
        for one in choices
    ]


def logprobs_of(model: torch.nn.Module, samples: list[dict[str, Any]]) -> torch.Tensor:
    """[samples, tokens] of the completions."""
    found = toolkit.token_logprobs(model, [one["sequence"] for one in samples])
    return torch.stack([one[-COMPLETION:] for one in found])


@pytest.mark.sweep
def test_samples_say_which_folder_s_weights_made_them_to_the_bit(chat_model, tmp_path):
    model = load_model(str(chat_model))[0]
    toolkit.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    folders, waiting, staleness = WeightFolders(tmp_path), deque(), []
    options = ("--port", "0", "--enable-admin-endpoints")
    with serving(chat_model, *options) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        version = http.get("/v1/models").json()["data"][0]["weight_version"]
        of_version = {version: {name: tensor.clone() for name, tensor in model.state_dict().items()}}
        for step in range(STEPS):
            waiting.append(rollout(http, step))
            if len(waiting) == 1 and step == 0:
                continue  # from here on a rollout waits while the one before is trained
            samples = waiting.popleft()
            (made,) = set.union(*(one["versions"] for one in samples))
            updates = sorted(of_version)
            staleness.append(updates.index(version) - updates.index(made))
            behaviour = torch.tensor([one["logprobs"] for one in samples])
            now = logprobs_of(model, samples)
            assert torch.equal(now.detach(), behaviour) == (made == version)

            rewards = torch.tensor([one["reward"] for one in samples])
            ratio = (now - behaviour).exp()  # the importance correction, clipped
            advantages = (rewards - rewards.mean())[:, None] + 0.1
            loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

            folder = folders.write(model.state_dict())
            http.post("/pause", params={"mode": "keep"}).raise_for_status()
            updated = http.post("/update_weights", json={"weight_dir": str(folder)}).raise_for_status().json()
            http.post("/resume").raise_for_status()
            folders.remove_previous()
            version = updated["weight_version"]
            of_version[version] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

            other = load_model(str(chat_model))[0]
            toolkit.patch(other)
            other.load_state_dict(of_version[made])
            assert torch.equal(logprobs_of(other, samples).detach(), behaviour)
    assert staleness == [0, 1, 1]
    assert len(of_version) == STEPS
