"""``--tensor-parallel-size``: the ranks of a command, each a process of this machine.

The process that the user starts is the first rank. It starts the others with its own command line, and ends them with
itself. Each opens the model and keeps its shard.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from toolkit.cli import signs_of_life
from toolkit.cli.launch import lost_process
from toolkit.cli.loopback import joined_store, keep_gloo_local, listening_store
from toolkit.errors import ToolkitError, first_line

if TYPE_CHECKING:
    from toolkit.engine.leading import RankEngine

_RANK, _STORE, _PIPE = (f"TOOLKIT_TENSOR_PARALLEL_{name}" for name in ("RANK", "STORE", "PIPE"))
_END = 5.0
"""Seconds in which a rank ends whose connections are closed already."""
_FOR_EVER = timedelta(days=3650)  # the other ranks wait as long as no request comes; one that ends closes its sockets


def add_ranks_option(parser: argparse.ArgumentParser) -> None:
    """``--tensor-parallel-size`` and ``--tensor-parallel-timeout``."""
    parser.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        default=1,
        metavar="N",
        help="processes, each on its GPU or on the CPUs of this machine, over which the model is split (default: 1)",
    )
    parser.add_argument(
        "--tensor-parallel-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="end, with a sentence, when one of them gives no sign of life for so long (default: 60; 0: never)",
    )


def is_first_rank() -> bool:
    """Whether this process is the one that the user started."""
    return _RANK not in os.environ


class Ranks:
    """The ranks of one command, as one of them sees them.

    Args:
        size: how many.
        words: of the command line.
        on_cuda: whether each has a GPU.
        timeout: seconds without a sign of life after which the first rank ends another one; 0 is never.
    """

    def __init__(self, size: int, words: list[str], on_cuda: bool, timeout: float = 0.0) -> None:
        self.size, self.rank = size, int(os.environ.get(_RANK, 0))
        self._on_cuda, self._timeout = on_cuda, timeout
        self._others: list[subprocess.Popen[bytes]] = []
        self._silent: set[int] = set()
        self._ending = False
        self._connect(words)

    def _connect(self, words: list[str]) -> None:
        import torch
        import torch.distributed as dist

        if self._on_cuda:
            if torch.cuda.device_count() < self.size:
                raise ToolkitError(
                    f"--tensor-parallel-size must be <= {torch.cuda.device_count()}, the GPUs here, got {self.size}."
                )
            torch.cuda.set_device(self.rank)
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.size))
        leads = self.rank == 0
        keep_gloo_local()
        store = listening_store() if leads else joined_store(int(os.environ[_STORE]))
        if leads:
            for rank in range(1, self.size):
                self._start(words, rank, store.port)
        else:
            if self._timeout:
                signs_of_life.give(int(os.environ[_PIPE]), self._timeout)
            for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or systemd: the first rank gets them too
                signal.signal(number, signal.SIG_IGN)
        with self.lost_ranks_named():
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=_FOR_EVER)
        assert dist.group.WORLD is not None
        self._control: str = dist.group.WORLD.group_name
        self._group: Any = dist.new_group(backend="nccl") if self._on_cuda else dist.group.WORLD

    def _start(self, words: list[str], rank: int, port: int) -> None:
        """Start the process of another rank; its standard output is this one's standard error."""
        read, write = os.pipe()
        environment = {**os.environ, _RANK: str(rank), _STORE: str(port), _PIPE: str(write)}
        command = [sys.executable, "-m", "toolkit.cli", *words]
        process = subprocess.Popen(command, env=environment, stdout=sys.stderr.fileno(), pass_fds=(write,))
        os.close(write)
        self._others.append(process)

        def lost() -> None:
            self._silent.add(rank)
            process.kill()  # one that is stopped, too; its connections close, and whoever waits for it is told

        if self._timeout:
            signs_of_life.watch(read, self._timeout, lost)
        else:
            os.close(read)

    def device(self, asked: str) -> str:
        """This rank's device where the user asked for this one."""
        return f"cuda:{self.rank}" if self._on_cuda else asked

    def engine(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> "RankEngine":
        """The engine of this rank, whose model is split."""
        from toolkit.engine.leading import LeadingEngine, RankEngine
        from toolkit.patching import patch
        from toolkit.patching.tensor_parallel import tensor_parallel

        dtype = options.get("kv_cache_dtype", "auto")
        patch(model, numerics=options.get("numerics"), kv_cache_dtype=None if dtype == "auto" else dtype)
        with self.lost_ranks_named():
            tensor_parallel(model, self._group)
            if self.rank == 0:
                return LeadingEngine(model, tokenizer, control=self._control, guard=self.lost_ranks_named, **options)
            return RankEngine(model, tokenizer, **options)

    def follow(self, engine: "RankEngine") -> int:
        """Make the first rank's calls until its engine is closed; the exit status."""
        from toolkit.engine.leading import follow

        try:
            follow(engine, self._control)
        except RuntimeError as error:
            print(f"toolkit: rank {self.rank} ends, since rank 0 has: {first_line(error)}", file=sys.stderr)
            return 1
        return 0

    def watch(self, lost: Callable[[str], None]) -> None:
        """Call ``lost`` with a sentence, on another thread, when another rank ends before this one's ``end``.

        One that has followed until this rank's engine was closed ends with 0, and may be faster than ``end``.
        """

        def wait(rank: int, process: subprocess.Popen[bytes]) -> None:
            if process.wait() != 0 and not self._ending:
                lost(self._ended(rank))

        for rank, process in enumerate(self._others, 1):
            threading.Thread(target=wait, args=(rank, process), name=f"rank {rank}", daemon=True).start()

    @contextmanager
    def lost_ranks_named(self) -> Iterator[None]:
        """Inside, an error of a collective becomes one that names the rank that has ended, where one has."""
        try:
            yield
        except RuntimeError as error:
            deadline = time.monotonic() + (_END if lost_process(error) else 0.0)
            while True:
                for rank, process in enumerate(self._others, 1):
                    if process.poll() is not None:
                        raise ToolkitError(self._ended(rank)) from error
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)

    def end(self, grace: float = 10.0) -> None:
        """Wait for the other ranks, which end with this one's engine; those that do not are killed."""
        self._ending = True
        for process in self._others:
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ended(self, rank: int) -> str:
        process = self._others[rank - 1]
        how = f"has ended with exit status {process.returncode}"
        if rank in self._silent:
            how = f"gave no sign of life for {self._timeout:g} s (--tensor-parallel-timeout) and was ended"
        return f"rank {rank} of tensor parallel (process {process.pid}) {how}."


@contextmanager
def ranks_of(args: argparse.Namespace, runner: str) -> Iterator[Ranks | None]:
    """The ranks that ``--tensor-parallel-size`` asks for, until the end of the block; None for one process.

    Raises:
        ToolkitError: for a size below 1, more than the machine's GPUs, and options that several ranks do not serve.
    """
    size = args.tensor_parallel_size
    if size < 1:
        raise ToolkitError(f"--tensor-parallel-size must be >= 1, got {size}.")
    timeout = args.tensor_parallel_timeout
    if timeout != 0 and not 1 <= timeout < math.inf:
        raise ToolkitError(f"--tensor-parallel-timeout must be 0 or >= 1, got {timeout:g}.")
    if size == 1:
        yield None
        return
    on_cuda = args.device.split(":")[0] == "cuda"
    if not on_cuda and args.device != "cpu":
        raise ToolkitError(f"--device must be cpu or cuda with --tensor-parallel-size, got {args.device}.")
    if getattr(args, "train", False):
        raise ToolkitError(f"--tensor-parallel-size must be 1 with --train, got {size}.")
    if runner != "generate":
        raise ToolkitError(f"--tensor-parallel-size must be 1 for a pooling model, got {size}.")
    ranks = Ranks(size, args.words, on_cuda, timeout)
    try:
        yield ranks
    finally:
        ranks.end()
