"""``--tensor-parallel-size``: the ranks of a command, each a process of this machine.

The process that the user starts is the first rank. It starts the others with its own command line, and ends them with
itself. Each opens the model and keeps its shard.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from toolkit.cli.loopback import joined_store, keep_gloo_local, listening_store
from toolkit.errors import ToolkitError, first_line

if TYPE_CHECKING:
    from toolkit.engine.leading import RankEngine

_RANK, _STORE = "TOOLKIT_TENSOR_PARALLEL_RANK", "TOOLKIT_TENSOR_PARALLEL_STORE"
_FOR_EVER = timedelta(days=3650)  # the other ranks wait as long as no request comes; one that ends closes its sockets


def add_ranks_option(parser: argparse.ArgumentParser) -> None:
    """``--tensor-parallel-size``."""
    parser.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        default=1,
        metavar="N",
        help="processes, each on its GPU or on the CPUs of this machine, over which the model is split (default: 1)",
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
    """

    def __init__(self, size: int, words: list[str], on_cuda: bool) -> None:
        self.size, self.rank = size, int(os.environ.get(_RANK, 0))
        self._on_cuda = on_cuda
        self._others: list[subprocess.Popen[bytes]] = []
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
            self._others = [_started(words, rank, store.port) for rank in range(1, self.size)]
        else:
            for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or systemd: the first rank gets them too
                signal.signal(number, signal.SIG_IGN)
        with self.lost_ranks_named():
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=_FOR_EVER)
        assert dist.group.WORLD is not None
        self._control: str = dist.group.WORLD.group_name
        self._group: Any = dist.new_group(backend="nccl") if self._on_cuda else dist.group.WORLD

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
                lost(_ended(rank, process))

        for rank, process in enumerate(self._others, 1):
            threading.Thread(target=wait, args=(rank, process), name=f"rank {rank}", daemon=True).start()

    @contextmanager
    def lost_ranks_named(self) -> Iterator[None]:
        """Inside, an error of a collective becomes one that names the rank that has ended, where one has."""
        try:
            yield
        except RuntimeError as error:
            for rank, process in enumerate(self._others, 1):
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    continue
                raise ToolkitError(_ended(rank, process)) from error
            raise

    def end(self, grace: float = 10.0) -> None:
        """Wait for the other ranks, which end with this one's engine; those that do not are killed."""
        self._ending = True
        for process in self._others:
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ended(rank: int, process: "subprocess.Popen[bytes]") -> str:
    return f"rank {rank} of tensor parallel (process {process.pid}) has ended with exit status {process.returncode}."


def _started(words: list[str], rank: int, port: int) -> "subprocess.Popen[bytes]":
    """The process of another rank; its standard output is this one's standard error."""
    environment = {**os.environ, _RANK: str(rank), _STORE: str(port)}
    return subprocess.Popen([sys.executable, "-m", "toolkit.cli", *words], env=environment, stdout=sys.stderr.fileno())


@contextmanager
def ranks_of(args: argparse.Namespace, runner: str) -> Iterator[Ranks | None]:
    """The ranks that ``--tensor-parallel-size`` asks for, until the end of the block; None for one process.

    Raises:
        ToolkitError: for a size below 1, more than the machine's GPUs, and options that several ranks do not serve.
    """
    size = args.tensor_parallel_size
    if size < 1:
        raise ToolkitError(f"--tensor-parallel-size must be >= 1, got {size}.")
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
    ranks = Ranks(size, args.words, on_cuda)
    try:
        yield ranks
    finally:
        ranks.end()
