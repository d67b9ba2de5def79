"""``--num-processes``: the processes of a run on this machine, without a launcher's configuration."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import IO, Any

from toolkit.cli.loopback import ADDRESS, keep_gloo_local, listening_store
from toolkit.errors import ToolkitError
from toolkit.machine import cpu_count

LAUNCHED = "TOOLKIT_LAUNCHED"
"""In the environment of processes that ``launch`` started."""
BEREFT = 75
"""Exit status of a process that ended because another one was gone."""
_GRACE = 5.0
"""Seconds that the others have to notice that one is gone."""
_SHOWN = 20
"""Lines of a failed process that are shown."""
_PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "LOCAL_RANK" in os.environ


def check_launched(processes: int) -> None:
    """Raise ToolkitError where a launcher started another number of processes."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count != processes:
        raise ToolkitError(f"--num-processes must be {count}, which were launched, or left out, got {processes}.")


def lost_process(error: RuntimeError) -> bool:
    """Whether it is what gloo or NCCL raise where another process has closed its connection."""
    import torch.distributed as dist

    text = str(error)
    closed = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, dist.DistError) or any(words in text for words in closed)


def end_with_launcher() -> None:
    """Let this process, which ``launch`` started, be asked to stop when its launcher is killed."""
    if LAUNCHED in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ[LAUNCHED]):
            os.kill(os.getpid(), signal.SIGTERM)


def end_process_group() -> None:
    """End the threads of this process's group, which could abort a Python that ends."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def launch(words: Sequence[str], processes: int) -> int:
    """Run the command line in so many processes of this machine; its exit status.

    The first one's output is shown; of the others what they say on standard error where one of them fails, which ends
    all. Signals go to all of them.

    Args:
        words: of the command line, after the program.
    """
    import torch

    store = listening_store()  # here, for a port that is only chosen could be taken before the first process listens
    shared = os.environ | {
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCHED: str(os.getpid()),
    }
    keep_gloo_local(shared)
    if shared.get("OMP_NUM_THREADS") == str(cpu_count()):
        del shared["OMP_NUM_THREADS"]  # of this process, which was alone
    if not torch.accelerator.is_available():
        shared["ACCELERATE_USE_CPU"] = "true"
    elif processes > torch.accelerator.device_count() and shared.get("ACCELERATE_USE_CPU") != "true":
        raise ToolkitError(
            f"--num-processes must be <= {torch.accelerator.device_count()}, a device for each, got {processes}; or "
            "set ACCELERATE_USE_CPU=true."
        )
    command = [sys.executable, "-m", "toolkit.cli", *words]
    with ExitStack() as stack:
        said: list[IO[Any] | None] = [None]
        said += [
            stack.enter_context(tempfile.TemporaryFile("w+", errors="replace", prefix="toolkit-"))
            for _ in range(1, processes)
        ]
        children = [
            subprocess.Popen(
                command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=stream, stderr=stream
            )
            for rank, stream in enumerate(said)
        ]
        with _handing_on(children) as received:
            status = _wait(children, said, received)
    return status


@contextmanager
def _handing_on(children: "Sequence[subprocess.Popen[Any]]") -> Iterator[list[int]]:
    """Inside, signals that ask to stop go to the children; gives those received. What is left at the end is killed."""
    received: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, hand_on)
    try:
        yield received
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: "Sequence[subprocess.Popen[Any]]", said: Sequence[IO[Any] | None], received: Sequence[int]) -> int:
    """The status of all of them: that of the one that failed, where one did, which is then said."""
    failed: int | None = None
    ended = 0.0
    while any(child.poll() is None for child in children):
        codes = [child.poll() for child in children]
        if failed is None and not received:
            failed = next((rank for rank, code in enumerate(codes) if code not in (None, 0, BEREFT)), None)
            ended = time.monotonic()
        if failed is not None and time.monotonic() - ended > _GRACE:
            break
        time.sleep(0.05)
    codes = [child.poll() for child in children]
    causes = [rank for rank, code in enumerate(codes) if code not in (None, 0, BEREFT)]
    if failed is None and causes:
        failed = causes[0]
    if failed is None and not received:  # a connection broke, and each takes another one for gone
        failed = next((rank for rank in reversed(range(len(codes))) if codes[rank]), None)
    if failed is None:
        return next((code for code in codes if code), 0)
    code = codes[failed] or 0
    if not received and codes[0] in (None, 0, BEREFT, -signal.SIGKILL):
        _say(failed, len(children), code, said[failed])
    return code if code > 0 else 128 - code


def _say(rank: int, processes: int, code: int, stream: IO[Any] | None) -> None:
    """Which process failed, and how its output ends."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with status {code}"
    text = ""
    if stream is not None:
        stream.flush()
        stream.seek(0)
        text = "".join(stream.readlines()[-_SHOWN:])
        if "toolkit: " in text:
            text = text[text.rindex("toolkit: ") :].removeprefix("toolkit: ")
    text = f": {text.strip()}" if text.strip() else "."
    print(f"toolkit: process {rank} of {processes} {how}, and with it the run{text}", file=sys.stderr, flush=True)
