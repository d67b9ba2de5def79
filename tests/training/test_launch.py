"""``toolkit train --num-processes``: processes without a launcher's configuration, their signals and failures."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import processes
from tests.helpers.listeners import LOOPBACK, listening
from tests.helpers.processes import ENVIRONMENT, read_until
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.cli import launch, main
from toolkit.config import dump
from toolkit.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "toolkit.cli"]


def write_recipe(folder: Path, **train: Any) -> Path:
    write_corpus(folder / "text")
    recipe = tiny_recipe(folder, train=train, checkpoint={"save_steps": None}, log={"progress_seconds": 0.01})
    path = folder / "recipe.yaml"
    path.write_text(dump(recipe))
    return path


def start(*words: str) -> "subprocess.Popen[str]":
    """A run that lives for three minutes at most."""
    return processes.start([*CLI, "train", *words], 180)


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    """Their ids, in the order of ranks."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"toolkit.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.sweep
def test_a_signal_stops_all_with_a_checkpoint_and_the_printed_command_resumes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, max_steps=100_000, distributed="fsdp2")
    process = start(str(recipe), "--num-processes", "2")
    read_until(process, "  loss ")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    run = tmp_path / "runs" / "tiny"
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{last:06d}"
    (line,) = [line for line in said.splitlines() if "resume with: " in line]
    command = shlex.split(line.split("resume with: ")[1])
    assert command == [*CLI, "train", "--resume", str(recipe), "--num-processes", "2"]
    resumed = subprocess.run(
        [*command, f"train.max_steps={last + 2}"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "processes: 2 (fsdp2)" in resumed.stdout
    assert [one["step"] for one in read_metrics(run / "metrics.jsonl")] == list(range(1, last + 3))


@pytest.mark.sweep
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all_with_one_sentence(tmp_path: Path, rank: int) -> None:
    process = start(str(write_recipe(tmp_path, max_steps=100_000)), "--num-processes", "2")
    read_until(process, "  loss ")
    ranks = children_of(process)
    assert len(ranks) == 2
    for pid in (process.pid, *ranks):
        assert listening(pid) <= LOOPBACK
    os.kill(ranks[rank], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert said.count("toolkit: ") == 1
    assert f"toolkit: process {rank} of 2 was ended by SIGKILL, and with it the run" in said
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.sweep
def test_what_all_processes_refuse_is_said_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    result = subprocess.run(
        [*CLI, "train", str(recipe), "--num-processes", "2", "data.streams=3"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("toolkit: ")]
    assert line == "toolkit: data.streams must be a multiple of the 2 processes, got 3."


def test_numbers_that_contradict_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path))
    assert main(["train", recipe, "--num-processes", "0"]) == 2
    assert capsys.readouterr().err == "toolkit: --num-processes must be >= 1, got 0.\n"
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", recipe, "--num-processes", "2"]) == 2
    expected = "toolkit: --num-processes must be 4, which were launched, or left out, got 2.\n"
    assert capsys.readouterr().err == expected
    assert main(["train", recipe, "--num-processes", "4", "--check"]) == 0


def test_a_plan_is_of_one_process_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))

    def sizes(strategy: str) -> dict[str, float]:
        assert main(["train", recipe, "--plan", "--num-processes", "2", f"train.distributed={strategy}"]) == 0
        said = capsys.readouterr().out
        return {name: float(size) for name, size in re.findall(r"^  (\w+) +([\d.]+) KiB", said, re.M)}

    whole = sizes("ddp")
    halves = {
        "zero1": {"optimizer"},
        "zero2": {"optimizer", "gradients"},
        "zero3": {"optimizer", "gradients", "weights"},
        "fsdp2": {"optimizer", "gradients", "weights"},
    }
    for strategy, halved in halves.items():
        found = sizes(strategy)
        gathered = found.pop("gathered", None)
        assert gathered == (whole["weights"] if "weights" in halved else None)
        for name, size in found.items():
            assert size == pytest.approx(whole[name] / (2 if name in halved else 1), abs=0.11), (strategy, name)


def test_a_connection_that_breaks_for_all_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each takes the others for gone, and none of them has failed itself."""
    code = "import sys; print('toolkit: another process of the run is gone: no route', file=sys.stderr); sys.exit(75)"
    with (tmp_path / "said").open("w+") as said:
        children = [
            subprocess.Popen([sys.executable, "-S", "-c", code], stderr=stream) for stream in (subprocess.DEVNULL, said)
        ]
        assert launch._wait(children, [None, said], []) == 75
    expected = "process 1 of 2 failed with status 75, and with it the run: another process of the run is gone: no route"
    assert capsys.readouterr().err == f"toolkit: {expected}\n"


def test_what_gloo_says_of_a_lost_process() -> None:
    lost = RuntimeError("[enforce fail at pair.cc:547] . Connection closed by peer [127.0.0.1]:4711")
    assert launch.lost_process(lost)
    assert not launch.lost_process(RuntimeError("shape mismatch"))
