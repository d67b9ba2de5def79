"""Signals on real processes: a checkpoint at the step boundary, and the command that resumes from it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers import processes
from tests.helpers.objective_recipes import LOWER, objective_recipe
from tests.helpers.processes import ENVIRONMENT, read_until
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.cli.resume import resume_command
from toolkit.config import dump
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.signals import Interrupted, StopRequest

HERE = Path(__file__).parent
CLI = [sys.executable, "-m", "toolkit.cli"]


def start(words: list[str], folder: Path, program: list[str] = CLI, **options: Any) -> "subprocess.Popen[str]":
    """A process that lives for a minute at most."""
    return processes.start([*program, *words], 60, cwd=folder, **options)


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def resume_line(said: str) -> str:
    (line,) = [line for line in said.splitlines() if "resume with: " in line]
    return line.split("resume with: ")[1]


def write_recipe(folder: Path, name: str = "a recipe.yaml", **sections: Any) -> str:
    """A recipe of many tiny steps, at a path with a space, in a folder with one."""
    write_corpus(folder / "text")
    values = yaml.safe_load(dump(tiny_recipe(folder, log={"progress_seconds": 0.01, "report_to": "none"}, **sections)))
    values |= {"output_dir": "my runs"}
    (folder / name).write_text(yaml.safe_dump(values))
    return name


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.sweep), signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_the_printed_command_resumes(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "with space"
    recipe = write_recipe(folder, checkpoint={"save_steps": None}, train={"max_steps": 100_000})
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    words = ["train", recipe, "overwrite=true", f"model.config={config | {'model_type': 'llama'}}"]
    process = start(words, folder)
    read_until(process, "  loss ")
    begun = time.monotonic()
    process.send_signal(number)
    status, said = end(process)
    assert time.monotonic() - begun < 30
    assert status == 128 + number
    assert f"{number.name}: a checkpoint is saved at the next step boundary; again to stop at once" in said
    run = folder / "my runs" / "tiny"
    (saved,) = steps(run)
    lines = read_metrics(run / "metrics.jsonl")
    assert saved == f"step-{lines[-1]['step']:06d}"
    last = lines[-1]["step"] + 2
    command = resume_line(said)
    assert shlex.split(command)[:4] == [*CLI, "train"]
    assert "overwrite" not in command
    resumed = subprocess.run(
        f"{command} train.max_steps={last}", shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from my runs/tiny/checkpoints/{saved}" in resumed.stdout
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, last + 1))


@pytest.mark.sweep
def test_a_terminal_that_goes_away_costs_no_step(tmp_path: Path) -> None:
    """SIGHUP, and every write fails from then on."""
    recipe = write_recipe(tmp_path, checkpoint={"save_steps": None}, train={"max_steps": 100_000})
    master, terminal = os.openpty()
    process = subprocess.Popen([*CLI, "train", recipe], cwd=tmp_path, stdout=terminal, stderr=terminal, env=ENVIRONMENT)
    os.close(terminal)
    said = b""
    while b"loss" not in said.rpartition(b"step")[2]:
        said += os.read(master, 4096)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    run = tmp_path / "my runs" / "tiny"
    assert steps(run) == [f"step-{read_metrics(run / 'metrics.jsonl')[-1]['step']:06d}"]


@pytest.mark.sweep
def test_a_reader_that_goes_away_ends_no_run(tmp_path: Path) -> None:
    """As ``toolkit train ... | head`` and a log that nobody writes any more."""
    recipe = write_recipe(tmp_path, checkpoint={"save_steps": None}, train={"max_steps": 40})
    process = start(["train", recipe], tmp_path)
    read_until(process, "  loss ")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 0
    run = tmp_path / "my runs" / "tiny"
    assert steps(run) == ["step-000040"]
    assert (run / "result.json").exists()


def test_output_that_cannot_be_written_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with StopRequest():
            os.close(read)
            print("x" * 100_000)
            print("again", flush=True)
            assert sys.stdout.writable()
        assert sys.stdout is stream
        print("to nowhere", flush=True)


def test_a_hangup_that_is_to_be_ignored_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """The first is noted by a step that never ends."""
    script = (
        "import os, time\n"
        "from toolkit.training.signals import StopRequest\n"
        "with StopRequest() as stop, stop.deferred():\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.1)\n"
    )
    process = start(["-c", script], tmp_path, [sys.executable])
    read_until(process, "ready")
    process.send_signal(signal.SIGTERM)
    read_until(process, "again to stop at once")
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130
    assert time.monotonic() - begun < 5


def test_native_code_does_not_hold_up_a_signal(tmp_path: Path) -> None:
    """A call that does not return to Python, as the training of a tokenizer may take minutes."""
    script = (
        "import ctypes\n"
        "from toolkit.training import signals\n"
        "signals._UNHANDLED = 0.5\n"
        "with signals.StopRequest(lambda: print('said', flush=True)) as stop:\n"
        "    print('ready', flush=True)\n"
        "    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, (ctypes.c_char * 64)()\n"
        "    lock(mutex)\n"
        "    lock(mutex)\n"
    )
    process = start(["-c", script], tmp_path, [sys.executable])
    read_until(process, "ready")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    status, said = end(process)
    assert (status, said) == (143, "said\n")


@pytest.mark.sweep
@pytest.mark.parametrize("phase", ["data: ", "tokenizer: "])
def test_before_the_run_began_the_command_is_the_same_one(tmp_path: Path, phase: str) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 100_000})
    old = tmp_path / "my runs" / "tiny" / "checkpoints" / "step-000001"
    old.mkdir(parents=True)
    process = start(["train", recipe, "overwrite=true"], tmp_path)
    read_until(process, phase)
    process.send_signal(signal.SIGTERM)
    status, said = end(process)
    assert status == 143
    command = shlex.split(resume_line(said))
    if old.exists():  # the signal was faster than the run
        assert command == [*CLI, "train", recipe, "overwrite=true"]
    else:
        assert command == [*CLI, "train", "--resume", recipe]


GRPO = {"task": LOWER, "prompts": 4, "num_generations": 4}
LONG = {"rollout": {"max_completion_length": 4000, "max_num_seqs": 16}}


def write_grpo(folder: Path, objective: dict[str, Any], **sections: Any) -> str:
    recipe = objective_recipe(folder, "grpo", GRPO | objective, log={"progress_seconds": 0.01, "report_to": "none"},
                              **sections)  # fmt: skip
    (folder / "grpo.yaml").write_text(dump(recipe))
    return "grpo.yaml"


def test_a_signal_in_a_long_rollout_keeps_the_step_before(tmp_path: Path) -> None:
    """The rollout of thousands of tokens is given up; what resumes is bitwise what was not interrupted."""
    recipe = write_grpo(tmp_path, {}, train={"max_steps": 3}, checkpoint={"save_steps": None})
    whole = Trainer(objective_recipe(tmp_path, "grpo", GRPO, run_name="whole", train={"max_steps": 3}), quiet=True)
    whole.fit()

    class AtSecond(StopRequest):
        """Asked to stop while the third step rolls out."""

        @property
        def requested(self) -> bool:
            if trainer.step == 2 and trainer.objective.rollout._engine.has_work:  # type: ignore[attr-defined]
                self.accept(signal.SIGTERM)
            return super().requested

    from toolkit.config import load_recipe

    trainer = Trainer(load_recipe(str(tmp_path / recipe), ["run_name=parts"]), quiet=True, stop=AtSecond())
    with pytest.raises(Interrupted) as caught:
        trainer.fit()
    assert caught.value.status == 143
    assert steps(trainer.folder) == ["step-000002"]
    assert len(read_metrics(trainer.folder / "metrics.jsonl")) == 2
    again = load_recipe(str(tmp_path / recipe), ["run_name=parts", "resume_from_checkpoint=true"])
    resumed = Trainer(again, quiet=True)
    resumed.fit()
    for name, tensor in whole.hf_model.state_dict().items():
        assert torch.equal(tensor, resumed.hf_model.state_dict()[name]), name


@pytest.mark.sweep
@pytest.mark.parametrize("phase", ["held out", "warm-up"])
def test_a_signal_in_evaluation_and_warm_up(tmp_path: Path, phase: str) -> None:
    """In the evaluation by long rollouts that comes first, and in the run inside of the run."""
    if phase == "held out":
        recipe = write_grpo(
            tmp_path, LONG, train={"max_length": 4090}, evaluate={"do_eval": True},
            model={"config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                              "num_attention_heads": 2, "max_position_embeddings": 4096}},
        )  # fmt: skip
        wait, checkpoints = "patched: ", tmp_path / "runs" / "grpo"
    else:
        warmup = {"max_steps": 100_000, "learning_rate": 1e-2, "batch_tokens": 128}
        recipe = write_grpo(tmp_path, {"warmup": warmup})
        wait, checkpoints = "step 5/", tmp_path / "runs" / "grpo" / "warmup"
    process = start(["train", recipe], tmp_path)
    read_until(process, wait)
    time.sleep(0.3)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status, said = end(process)
    assert time.monotonic() - begun < 30
    assert status == 143
    assert resume_line(said) == shlex.join([*CLI, "train", "--resume", recipe])
    if phase == "warm-up":
        (saved,) = steps(checkpoints)
        process = start(shlex.split(resume_line(said))[3:], tmp_path)
        read_until(process, f"resumed from {checkpoints}/checkpoints/{saved}")
        process.kill()
        end(process)


@pytest.mark.parametrize(
    ("count", "expected"),
    [pytest.param(1, ["step-000001", "step-000002"], marks=pytest.mark.sweep), (2, ["step-000001"])],
)
def test_a_signal_while_a_checkpoint_is_written_loses_nothing(tmp_path: Path, count: int, expected: list[str]) -> None:
    """SIGTERM finds every write; the second one, in the middle of the next, leaves the first whole."""
    write_corpus(tmp_path / "text")
    script = (
        "import os, signal, sys\n"
        "from toolkit.config import load_recipe\n"
        "from toolkit.training import run_state, loop\n"
        "from toolkit.training.signals import StopRequest\n"
        "own = loop.write_run\n"
        "def write(trainer, staging, *rest):\n"
        "    own(trainer, staging, *rest)\n"
        "    for _ in range(int(sys.argv[2]) if trainer.step == 2 else 0): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    if trainer.step == 2:\n"
        "        import time; time.sleep(1)\n"
        "loop.write_run = write\n"
        "with StopRequest() as stop: loop.train(load_recipe(sys.argv[1]), stop=stop)\n"
    )
    recipe = tiny_recipe(tmp_path, run_name="signals", checkpoint={"save_steps": 1})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    process = start(["-c", script, "recipe.yaml", str(count)], tmp_path, [sys.executable])
    _, said = end(process)
    run = tmp_path / "runs" / "signals"
    assert steps(run) == expected, said
    assert (run / "checkpoints" / "latest").read_text().strip() == expected[-1]
    load_file(str(run / "checkpoints" / expected[-1] / "model.safetensors"))
    resumed = Trainer(recipe.model_copy(update={"resume_from_checkpoint": True}), quiet=True)
    assert resumed.step == len(expected)


@pytest.mark.sweep
@pytest.mark.parametrize("targets", ["one", "all"])
def test_processes_stop_after_the_same_step(tmp_path: Path, targets: str) -> None:
    write_corpus(tmp_path / "text")
    recipe = tiny_recipe(
        tmp_path, train={"max_steps": 100_000}, checkpoint={"save_steps": None}, log={"progress_seconds": 0.01}
    )
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "toolkit.cli", "train", "recipe.yaml"]
    process = start(words, tmp_path, launcher, env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"})
    read_until(process, "  loss ")
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    ranks = [pid for pid in children if b"toolkit.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    for pid in ranks[1:] if targets == "one" else ranks:
        os.kill(pid, signal.SIGTERM)
    _, said = end(process)
    (saved,) = steps(tmp_path / "runs" / "tiny")
    assert saved == f"step-{read_metrics(tmp_path / 'runs' / 'tiny' / 'metrics.jsonl')[-1]['step']:06d}"
    command = shlex.split(resume_line(said))
    assert command == [*launcher, *words[:3], "--resume", words[3]]


def test_the_command_of_a_script_and_of_another_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "toolkit"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    words = ["train", "a b.yaml", "resume_from_checkpoint=step-3", "overwrite=true"]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", str(script), *words])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resume_command(words, True) == "toolkit train --resume 'a b.yaml'"
    assert resume_command(words, False) == "toolkit train 'a b.yaml' resume_from_checkpoint=step-3 overwrite=true"
    monkeypatch.setenv("PATH", "/nowhere")
    assert resume_command(words, True) == f"{script} train --resume 'a b.yaml'"
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert resume_command(words, True) == "toolkit train --resume 'a b.yaml'"


@pytest.mark.sweep
@pytest.mark.parametrize("group", [False, True], ids=["process", "terminal"])
def test_the_demo_hands_the_signal_on_once(tmp_path: Path, group: bool) -> None:
    """To itself alone, as from kill, or to its process group, as from a terminal: training saves and it ends."""
    recipe = write_recipe(tmp_path, checkpoint={"save_steps": None})
    words = ["demo", "--recipe", recipe, "output_dir=runs", "train.max_steps=100000"]
    process = start(words, tmp_path, start_new_session=True)
    read_until(process, "  loss ")
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    status, said = end(process)
    assert status == 130
    assert len(steps(tmp_path / "runs" / "demo")) == 1
    command = shlex.split(resume_line(said))
    assert command[:6] == [*CLI, "train", "--resume", recipe]
    assert "run_name=demo" in command
