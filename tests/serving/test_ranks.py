"""``toolkit serve --tensor-parallel-size``: real processes, the first of which serves."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import toolkit
from tests.helpers.adapter_folders import save_adapter
from tests.helpers.listeners import LOOPBACK, listening
from tests.helpers.server_process import ServerProcess, serving
from toolkit.cli import main
from toolkit.cli.ranks import Ranks
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model, tiny_tokenizer

pytestmark = pytest.mark.sweep

PROMPT = [5, 6, 7, 8]
OPTIONS = ("--port", "0", "--tensor-parallel-size", "2", "--max-model-len", "64", "--num-blocks", "16", "--grace", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model") / "served"
    random_model("qwen3").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def complete(server: ServerProcess, **fields: Any) -> Any:
    body = {"model": "served", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    return post(server, "/v1/completions", body | fields)["choices"]


def post(server: ServerProcess, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=200) as response:
        return json.load(response)


def error_of(server: ServerProcess, path: str, body: Any) -> tuple[int, str]:
    """The status and the sentence of an error."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(server, path, body)
    return raised.value.code, json.load(raised.value)["error"]["message"]


def others(server: ServerProcess) -> list[int]:
    """Processes of the other ranks."""
    listed = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [int(one) for one in listed.split()]


def has_ended(process: int) -> bool:
    """Whether a process has ended; nobody may have asked for its status yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


def test_several_ranks_serve_as_one_process_and_end_together(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "trained"
    model = random_model("qwen3")
    toolkit.patch(model)
    greedy = toolkit.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    sampled = toolkit.SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=3, ignore_eos=True)
    with toolkit.Engine(model) as engine:
        expected = engine.generate([PROMPT, PROMPT], [greedy, sampled])
        trained = random_model("qwen3", seed=1)
        trained.save_pretrained(other)
        model.load_state_dict(trained.state_dict())
        anew = engine.generate([PROMPT], greedy)
    model.load_state_dict(random_model("qwen3").state_dict())
    adapter = save_adapter(random_model("qwen3"), tmp_path / "adapter")
    with toolkit.Engine(model) as engine:
        engine.load_adapter("a", adapter)
        chosen = engine.generate([PROMPT], dataclasses.replace(greedy, lora_name="a"))
    with serving(folder, *OPTIONS, "--enable-admin-endpoints") as server:
        found = complete(server) + complete(server, temperature=1.0, seed=3, n=3)
        ranks = others(server)
        for process in (server.process.pid, *ranks):
            assert listening(process) <= LOOPBACK
        with urllib.request.urlopen(f"{server.url}/get_world_size", timeout=200) as response:
            assert json.load(response) == {"world_size": 2}
        status, said = error_of(server, "/v1/load_lora_adapter", {"lora_name": "none", "lora_path": str(tmp_path)})
        assert (status, "must be a folder with adapter_config.json" in said) == (404, True)
        post(server, "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": str(adapter)})  # on all ranks
        adapted = complete(server, model="a")
        post(server, "/v1/unload_lora_adapter", {"lora_name": "a"})
        status, said = error_of(server, "/export", {"path": str(tmp_path / "out"), "to": "hf"})
        assert (status, "split over ranks" in said) == (400, True)
        for process in ranks:  # as systemd does, which signals all processes: the first rank finishes what runs
            os.kill(process, signal.SIGTERM)
        updated = post(server, "/update_weights", {"weight_dir": str(other)})
        after = complete(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(200) == 0
        assert updated["weight_version"] > 0
        assert len(ranks) == 1
        assert all(map(has_ended, ranks))
    assert [one["logprobs"]["token_logprobs"] for one in found] == [one.logprobs for one in expected]
    assert after[0]["logprobs"]["token_logprobs"] == anew[0].logprobs
    assert anew[0].logprobs != expected[0].logprobs
    assert adapted[0]["logprobs"]["token_logprobs"] == chosen[0].logprobs
    assert chosen[0].logprobs != expected[0].logprobs


def test_a_rank_that_dies_ends_the_server_with_a_sentence(folder: Path) -> None:
    with serving(folder, *OPTIONS) as server:
        complete(server)
        (rank,) = others(server)
        os.kill(rank, signal.SIGKILL)
        assert server.process.wait(200) == 1
        server.errors_read()
        assert f"rank 1 of tensor parallel (process {rank}) has ended with exit status -9." in "".join(server.errors)


def test_ranks_end_when_the_first_one_dies(folder: Path) -> None:
    with serving(folder, *OPTIONS) as server:
        assert len(others(server)) == 1
        server.process.kill()
        server.process.wait()
        server.errors_read()  # to the end: the other rank writes there too
        assert "toolkit: rank 1 ends, since rank 0 has: " in "".join(server.errors)


@pytest.mark.parametrize("busy", [False, True])
def test_a_rank_that_is_stopped_ends_the_server_with_a_sentence(folder: Path, busy: bool) -> None:
    """A stopped process closes no connection: nothing but the missing signs of life shows it."""
    with serving(folder, *OPTIONS, "--tensor-parallel-timeout", "8") as server:
        complete(server)
        (rank,) = others(server)
        os.kill(rank, signal.SIGSTOP)
        if busy:
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                complete(server)
        assert server.process.wait(200) == 1
        server.errors_read()
        said = f"rank 1 of tensor parallel (process {rank}) gave no sign of life for 8 s (--tensor-parallel-timeout)"
        assert said in "".join(server.errors)
        assert has_ended(rank)


def test_a_server_that_is_stopped_as_a_whole_goes_on(folder: Path) -> None:
    with serving(folder, *OPTIONS, "--tensor-parallel-timeout", "10") as server:
        before = complete(server)
        processes = [*others(server), server.process.pid]
        for number, pause in ((signal.SIGSTOP, 12.0), (signal.SIGCONT, 0.0)):
            for process in processes:
                os.kill(process, number)
            time.sleep(pause)
        assert complete(server)[0]["logprobs"] == before[0]["logprobs"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(200) == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-tp", "0"], "--tensor-parallel-size must be >= 1, got 0."),
        (["-tp", "2", "--device", "meta"], "--device must be cpu or cuda with --tensor-parallel-size, got meta."),
        (["-tp", "2", "--tensor-parallel-timeout", "0.5"], "--tensor-parallel-timeout must be 0 or >= 1, got 0.5."),
        (["-tp", "2", "--train"], "--tensor-parallel-size must be 1 with --train, got 2."),
    ],
)
def test_options_that_do_not_fit(options: list[str], why: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), "--port", "0", *options]) == 2
    assert f"toolkit: {why}" in capfd.readouterr().err


def ranks_of_commands(commands: list[str]) -> Ranks:
    """The first rank of those whose processes run other Python."""
    ranks = Ranks.__new__(Ranks)
    ranks._ending, ranks._silent = False, set()
    ranks._others = [subprocess.Popen([sys.executable, "-c", command]) for command in commands]
    return ranks


def test_an_error_that_no_lost_rank_has_made_is_raised_at_once() -> None:
    ranks = ranks_of_commands(["import time; time.sleep(200)"] * 3)
    begun = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="a defect"), ranks.lost_ranks_named():
            raise RuntimeError("a defect")
        assert time.monotonic() - begun < 4  # it was 5 s for every rank
    finally:
        ranks.end(0)


def test_the_rank_that_ended_is_named_whichever_it_is() -> None:
    ranks = ranks_of_commands(["import time; time.sleep(200)", "raise SystemExit(3)"])
    try:
        with (
            pytest.raises(
                ToolkitError, match=r"rank 2 of tensor parallel \(process \d+\) has ended with exit status 3"
            ),
            ranks.lost_ranks_named(),
        ):
            raise RuntimeError("Connection closed by peer [127.0.0.1]:5")
    finally:
        ranks.end(0)


@pytest.mark.parametrize(("status", "said"), [(0, 0), (3, 1)])
def test_a_rank_that_ends_as_it_should_is_not_lost(status: int, said: int) -> None:
    """The engine is closed, and ``end`` is not called yet."""
    ranks = ranks_of_commands([f"raise SystemExit({status})"])
    sentences: list[str] = []
    before = set(threading.enumerate())
    ranks.watch(sentences.append)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert ranks._others[0].poll() == status
    assert len(sentences) == said
