"""The program of ``docs/async-grpo.md`` against real servers: TRL's AsyncGRPOTrainer, killed servers and trainers.

aiohttp, which TRL's rollout worker needs, is installed beside this environment's packages.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.client_environments import OFFLINE, ROOT, client_environment
from tests.helpers.server_process import ServerProcess, serving
from toolkit.testing.models import random_model, tiny_tokenizer

STEPS, SAVED = 24, 4
PAGE = ROOT / "docs" / "async-grpo.md"
SERVE = ("--enable-admin-endpoints", "--max-model-len", "256")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with aiohttp, beside this environment's packages."""
    return client_environment(tmp_path_factory.mktemp("environment"), "async-grpo", ["aiohttp"], beside=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trl.chat_template_utils import qwen3_chat_template

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = qwen3_chat_template  # a template whose replies TRL reads
    random_model("llama", vocabulary=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Run:
    """A trainer's process."""

    def __init__(self, python: str, model: Path, url: str, folder: Path, *options: str, max_staleness: int = 1) -> None:
        (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        assert program.count("max_staleness=1") == 1
        (folder / "train.py").write_text(program.replace("max_staleness=1", f"max_staleness={max_staleness}"))
        self.folder, self.log = folder, folder / f"log-{len(options)}.txt"
        home = {"HOME": str(folder), "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "train.py", str(model), url, *options], cwd=folder, stdout=log, stderr=log,
                env={**os.environ, **OFFLINE, **home},
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text()

    def checkpoint(self, step: int) -> Path:
        return self.folder / "async-grpo" / f"checkpoint-{step}"

    def history(self) -> list[dict[str, Any]]:
        """What was logged, of each step."""
        state = json.loads((self.checkpoint(STEPS) / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "reward" in entry]

    def until_it_has_saved(self, step: int) -> None:
        def saved() -> bool:
            assert self.process.poll() is None, self.text[-4000:]
            return (self.checkpoint(step) / "trainer_state.json").exists()

        until(saved, 600, lambda: self.text[-4000:])

    def ended(self, well: bool = True, seconds: float = 900) -> str:
        """What it printed."""
        assert (self.process.wait(seconds) == 0) == well, self.text[-6000:]
        return self.text


def until(holds: Callable[[], bool], seconds: float, told: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, told()
        time.sleep(0.05)


@contextmanager
def running(*arguments: Any, **settings: Any) -> Iterator[Run]:
    run = Run(*arguments, **settings)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


@contextmanager
def served(model: Path, url: str | None = None) -> Iterator[ServerProcess]:
    """A server, at the port of ``url``."""
    port = "0" if url is None else url.rpartition(":")[2]
    with serving(model, "--port", port, *SERVE) as server:
        yield server


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_rollout_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def same_bits(history: list[dict[str, Any]]) -> int:
    """How many tokens were compared, none of which differs in a bit."""
    compared = [entry for entry in history if "mismatch/bits" in entry]
    assert {entry["mismatch/bits"] for entry in compared} == {0.0}
    assert {entry["mismatch/kl"] for entry in compared} == {0.0}
    return int(sum(entry["mismatch/tokens_total"] for entry in compared))


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_rewards_rise_and_no_bit_differs(max_staleness, python, model, tmp_path):
    with served(model) as server, running(python, model, server.url, tmp_path, max_staleness=max_staleness) as run:
        run.ended()
        history = run.history()
    assert len(history) == STEPS
    rewards = [entry["reward"] for entry in history]
    print("rewards", [round(one, 2) for one in rewards])
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    compared, others = same_bits(history), sum(entry["off_policy/tokens_total"] for entry in history)
    print("tokens compared", compared, "of other weights", others)
    if max_staleness == 0:  # of each step's three batches one is read ahead
        assert sum(entry["mismatch/tokens_total"] > 0 for entry in history) > STEPS / 2
    assert others > 0
    assert max(entry["sample/staleness_max"] for entry in history) <= max_staleness
    assert max(entry["off_policy/staleness_max"] for entry in history) <= max_staleness + 1
    for entry in history:
        assert entry["ratio"] > 0
        assert 0 <= entry["clip_ratio/region_mean"] <= 1
    assert not list((tmp_path / "async-grpo" / "weights").iterdir())


def test_a_killed_trainer_takes_its_worker_along_and_goes_on(python, model, tmp_path):
    with served(model) as server:
        with running(python, model, server.url, tmp_path) as run:
            run.until_it_has_saved(SAVED)
            workers = [pid for pid in children(run.process.pid) if is_rollout_worker(pid)]
            assert workers
            run.process.send_signal(signal.SIGKILL)
            run.process.wait(60)
            until(lambda: not any(map(is_rollout_worker, workers)), 60)
            assert "The trainer has ended, and so its rollout worker ends." in run.text
        with running(python, model, server.url, tmp_path, "--resume") as again:
            again.ended()
            history = again.history()
    assert [entry["step"] for entry in history] == list(range(1, STEPS + 1))
    assert same_bits(history) > 0


def test_a_killed_server_is_a_sentence_and_a_new_one_goes_on(python, model, tmp_path):
    with served(model) as server, running(python, model, server.url, tmp_path) as run:
        run.until_it_has_saved(SAVED)
        server.process.kill()
        assert f"ToolkitError: The server at {server.url} does not answer" in run.ended(well=False)
    with served(model, server.url) as other, running(python, model, other.url, tmp_path, "--resume") as again:
        again.until_it_has_saved(2 * SAVED)
        other.process.kill()
        with served(model, server.url):
            told = again.ended(well=False)
            assert re.search("ToolkitError: The server at .* (was started again|does not answer)", told), told[-4000:]
    with served(model, server.url), running(python, model, server.url, tmp_path, "--resume") as third:
        third.ended()
        assert [entry["step"] for entry in third.history()] == list(range(1, STEPS + 1))
        assert same_bits(third.history()) > 0
