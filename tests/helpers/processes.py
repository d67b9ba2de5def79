"""Commands that are read as they run; and gloo processes, by torchrun (``accelerate launch`` starts them by mpirun)."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
"""Of a command that is read line by line."""


def start(command: Sequence[str], seconds: float, **options: Any) -> "subprocess.Popen[str]":
    """A process, which lives for so many seconds at most; ``read_until`` reads its output and errors."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **{"env": ENVIRONMENT} | options
    )
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return process


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """What the process says up to a line with ``text``."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(said)


def run_processes(script: str, *arguments: Any, says: str, processes: int = 2, seconds: int = 200) -> None:
    """Run a script of the folder of tests; every process must print ``says``, and none may fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, str(TESTS / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(says) == processes


def end_with_same_weights(recipe: Any) -> None:
    """In one of two processes: train the recipe; says "same weights" when both ended with the same. Does not return."""
    import torch
    from accelerate.utils import gather_object

    from toolkit.training.loop import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(recipe, quiet=True)
    assert trainer.accelerator.num_processes == 2
    trainer.fit()
    sums = gather_object([[parameter.double().sum().item() for parameter in trainer.hf_model.parameters()]])
    assert sums[0] == sums[1]
    print("same weights", flush=True)
    os._exit(0)  # a thread of gloo that lets go of its last tensors while Python ends aborts the process now and then
