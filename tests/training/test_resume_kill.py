"""SIGKILL at random moments: what is left always loads, and a resumed run ends with the uninterrupted run's weights.

The test starts this file as a separate process, which imports once and forks a child per attempt.
"""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

STEPS = 12


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.sweep)])
def test_killed_many_times_ends_with_the_same_weights(tmp_path: Path, kills: int) -> None:
    here = Path(__file__)
    environment = os.environ | {
        "PYTHONPATH": str(here.parents[2]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    result = subprocess.run(
        [sys.executable, str(here), str(tmp_path), str(kills)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    print(result.stdout)
    assert f"{kills} kills" in result.stdout


def main(folder: Path, wanted: int) -> None:
    # Imported here, once; with one thread a side torch starts none, so this process may fork.
    import torch
    from safetensors.torch import load_file

    from tests.helpers.training_recipes import tiny_recipe, write_corpus
    from toolkit.loading import find_source
    from toolkit.loading.run import name_of
    from toolkit.training.corpus import list_files
    from toolkit.training.loop import Trainer
    from toolkit.training.metrics import read_metrics
    from toolkit.training.resume import find_start
    from toolkit.training.tokenizer import train_tokenizer

    torch.set_num_threads(1)
    write_corpus(folder / "text")
    pipe_in, pipe_out = os.pipe()

    def recipe(name: str):  # type: ignore[no-untyped-def]
        return tiny_recipe(
            folder,
            run_name=name,
            resume_from_checkpoint=True,
            tokenizer={"name_or_path": str(folder / "tokenizer")},
            train={"max_steps": STEPS},
            checkpoint={"save_steps": 1, "save_total_limit": 2},
        )

    def fork(work: Callable[[], None]) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        return child

    def wait(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def train(name: str) -> None:
        trainer = Trainer(recipe(name), quiet=True)
        os.write(pipe_out, b"s")
        trainer.fit()

    def make_tokenizer() -> None:
        train_tokenizer([file.read() for file in list_files(recipe("x").data)], 270, 16).save_pretrained(
            str(folder / "tokenizer")
        )

    assert wait(fork(make_tokenizer)) == 0  # in a child, for it starts threads
    warm = Trainer(recipe("warm"), quiet=True)  # what is imported on the way, the children need not import again
    warm.train_step()
    warm.save()
    begun = time.monotonic()
    child = fork(lambda: train("whole"))
    os.read(pipe_in, 1)
    setting_up, begun = time.monotonic() - begun, time.monotonic()
    assert wait(child) == 0
    fitting = time.monotonic() - begun
    reference = folder / "runs" / "whole"
    expected = load_file(str(find_source(reference).folder / "model.safetensors"))
    losses = [line["loss"] for line in read_metrics(reference / "metrics.jsonl")]
    assert len(losses) == STEPS

    def compare(name: str) -> None:
        last = find_source(folder / "runs" / name).folder
        assert last.name == name_of(STEPS)
        got = load_file(str(last / "model.safetensors"))
        assert set(got) == set(expected)
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
        assert [line["loss"] for line in read_metrics(folder / "runs" / name / "metrics.jsonl")] == losses

    chance = random.Random(int(os.environ.get("TOOLKIT_KILL_SEED", "0")))
    kills, finished, writing, beginnings = 0, 0, 0, 0
    while kills < wanted:
        name = f"run-{finished}"
        child = fork(lambda name=name: train(name))
        if chance.random() < 0.2:  # some die while they set up or resume
            time.sleep(chance.random() * setting_up)
        else:
            os.read(pipe_in, 1)
            time.sleep(chance.random() * fitting * 0.6)
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        while select.select([pipe_in], [], [], 0)[0]:
            os.read(pipe_in, 1)
        if status == 0:  # it was faster; the next run begins
            compare(name)
            finished += 1
            continue
        assert status == -signal.SIGKILL, status
        kills += 1
        checkpoints = folder / "runs" / name / "checkpoints"
        writing += any(checkpoints.glob(".*"))
        start = find_start(recipe(name))  # verifies the size and hash of every file
        if start is None:
            beginnings += 1
        else:
            load_file(str(start.checkpoint / "model.safetensors"))
    assert wait(fork(lambda: train(f"run-{finished}"))) == 0
    compare(f"run-{finished}")
    print(
        f"{kills} kills, {finished + 1} runs finished, {writing} kills left a half-written checkpoint, "
        f"{beginnings} came before the first checkpoint"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
