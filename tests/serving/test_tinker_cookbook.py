"""The loops of tinker-cookbook, unmodified and offline, against a server process."""

import json
import random

import numpy as np
import pytest

from tests.helpers.arithmetic_model import sum_conversation, write_arithmetic_model
from tests.helpers.client_environments import client_environment, run_script
from tests.helpers.server_process import serving

COOKBOOK = (
    "tinker-cookbook==0.6.1", "antlr4-python3-runtime==4.13.2", "blobfile==3.3.0", "chz==0.4.0", "cloudpickle==3.1.3",
    "latex2sympy2_extended==1.11.0", "lxml==6.1.3", "math-verify==0.9.0", "pycryptodomex==3.24.2", "pylatexenc==2.11",
    "termcolor==3.3.0", "tiktoken==0.14.0",
)  # fmt: skip
"""Installed alone: the cookbook pins a package that the index does not have, and which nothing here imports."""
STEPS = 24
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def test_its_loops_run_and_sample_what_they_train_on(tmp_path):
    python = client_environment(tmp_path, "tinker-cookbook", ["--no-deps", *COOKBOOK], beside=True)
    folder, conversations = tmp_path / "half-adder", tmp_path / "sums.jsonl"
    write_arithmetic_model(folder, 1.7)
    chance = random.Random(1)
    sums = [sum_conversation(chance.randint(0, 100), chance.randint(0, 100)) for _ in range(272)]
    conversations.write_text("".join(json.dumps({"messages": one}) + "\n" for one in sums))
    options = ("--port", "0", "--max-model-len", "1024", "--train", "--train-folder", str(tmp_path / "checkpoints"))
    with serving(folder, *options) as server:
        seen = run_script(
            python, "tinker_cookbook_recipes.py", tmp_path, server.url, str(folder), str(conversations), str(STEPS)
        )
    first, both = seen["supervised"], seen["resumed"]
    assert [one["step"] for one in both] == list(range(2 * len(first)))  # it continues where it was
    losses = [one["train_mean_nll"] for one in both]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    for name in ("arithmetic", "game"):
        differences = [one[f"optim/kl_sample_train_{kind}"] for one in seen[name] for kind in ("v1", "v2")]
        assert differences == [0.0] * len(differences)
    rewards = [one["env/all/reward/total"] for one in seen["arithmetic"]]
    print("mean reward of each step:", *(f"{one:.3f}" for one in rewards))
    assert (len(rewards), len(seen["game"])) == (STEPS, 2)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.01  # -0.1 without the form of a reply, 0 with it
