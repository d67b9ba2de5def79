"""The unmodified tinker client, its newest version and the one before, against a server process."""

import random
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.client_environments import run_script
from tests.helpers.server_process import serving
from toolkit.serving.tinker.sessions import TESTED_CLIENTS
from toolkit.testing.models import random_model, tiny_tokenizer

KILLS = 20
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    torch.manual_seed(0)
    random_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    options = ("--port", "0", "--max-model-len", "256", "--train", "--api-key", "tml-secret")
    with serving(folder, *options) as one:
        yield one, folder


def installed(version, folder):
    """A folder with this version of the client; what it needs is installed here."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"tinker=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("version", TESTED_CLIENTS)
def test_a_client_learns_sums(server, version, tmp_path):
    one, folder = server
    packages = installed(version, tmp_path / "packages")
    seen = run_script(sys.executable, "tinker_loop.py", tmp_path, one.url, str(folder), PYTHONPATH=str(packages))
    assert seen["version"] == version
    assert seen["supervised"][-1] < 0.5 * seen["supervised"][0]
    assert np.mean(seen["rewards"][-4:]) > np.mean(seen["rewards"][:4]) + 0.2
    assert set(seen["differences"]) == {0.0}  # kl_sample_train_v1 reads exactly 0 at every step
    saved, resumed = seen["resumed"]
    assert saved == resumed
    assert seen["custom"]["squares"] > 0
    assert seen["scored"][0] is None
    assert all(value < 0 for value in seen["scored"][1:])
    assert seen["same"][0] == seen["same"][1]
    assert {"weights/before", "sampler_weights/last"} < set(seen["listed"])
    assert seen["left"] == [one for one in seen["listed"] if one != "sampler_weights/last"]
    assert [one.rpartition("/")[2] for one in seen["expiring"]] == ["last"]
    assert len(seen["runs"]) >= 2  # and the one that was resumed
    assert seen["downloaded"] is None or "adapter_model.safetensors" in seen["downloaded"]
    body = {"prompt": "1+1=", "max_tokens": 2, "temperature": 0}
    response = httpx.post(f"{one.url}/v1/completions", json=body, headers={"authorization": "Bearer tml-secret"})
    assert response.status_code == 200, response.text
    refused = httpx.post(f"{one.url}/api/v1/create_session", json={}, headers={"X-API-Key": "tml-wrong"})
    assert refused.status_code == 401


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def rounds(folder, checkpoints, count, kills, tmp_path):
    """What the client saw, and its last weights, with ``kills`` SIGKILLs at random times after it got on."""
    port, chance, counted = free_port(), random.Random(0), tmp_path / "count"
    options = ("--port", str(port), "--max-model-len", "256", "--train", "--train-folder", str(checkpoints))
    seen = {}

    def run():
        arguments = (f"http://127.0.0.1:{port}", "tiny", str(count), str(counted))
        seen.update(run_script(sys.executable, "tinker_rounds.py", tmp_path, *arguments))

    client = threading.Thread(target=run)
    counted.write_text("0")
    for _ in range(kills):
        with serving(folder, *options) as one:
            if client.ident is None:
                client.start()
            before = counted.read_text()
            while counted.read_text() == before and client.is_alive():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1))
            assert client.is_alive(), "the client must outlive all servers but the last"
            one.process.kill()
    with serving(folder, *options):
        if client.ident is None:
            client.start()
        client.join()
    name = seen["path"].removeprefix("tinker://")
    return seen, load_file(checkpoints / name / "adapter_model.safetensors")


@pytest.mark.timeout(3600)
def test_a_client_does_not_notice_servers_that_are_killed(folder, tmp_path):
    """Weights, losses and samples are bitwise those of a server that nobody killed."""
    found = {}
    for name, kills in (("undisturbed", 0), ("killed", KILLS)):
        (tmp_path / name).mkdir()
        found[name] = rounds(folder, tmp_path / name / "checkpoints", 6 * KILLS, kills, tmp_path / name)
    (seen, weights), (after, others) = found.values()
    assert after["losses"] == seen["losses"]
    assert after["samples"] == seen["samples"]
    assert weights.keys() == others.keys()
    assert all(torch.equal(one, others[name]) for name, one in weights.items())
