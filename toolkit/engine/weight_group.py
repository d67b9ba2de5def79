"""Weights from a trainer's process into others, over a separate gloo group of ``torch.distributed``.

Tensors travel in order as bytes, packed into buffers. A buffer ends with the tensor by which it has more than
``buffer_size`` bytes, which both sides find out from the sizes alone (the rule of vLLM's packed updates).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import ToolkitError, first_line

BUFFER_SIZE = 64 * 2**20
"""Bytes."""
_JOIN = timedelta(seconds=60)
_TRANSFER = timedelta(seconds=60)  # of a buffer, once both sides are there: gloo gives up no operation before
_WAIT = 600.0  # seconds for the other side; gathering a sharded parameter comes between two buffers
_LOOK = 0.001  # seconds

Item = TypeVar("Item")


class TensorInfo(NamedTuple):
    """What comes.

    Attributes:
        name: of the parameter.
        dtype: of the sender's tensor.
        shape: of it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def like(self) -> Tensor:
        """A tensor of it without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class WeightGroup:
    """A trainer, which is rank 0 and sends, and those that receive.

    All processes make theirs at the same time. gloo listens where the machine's name points to, or at
    ``GLOO_SOCKET_IFNAME``. A buffer is passed on once all say in the store that they are there: until then each side
    can give up.

    Args:
        address: of the trainer, as the others reach it.
        port: where rank 0 opens the store by which they find each other.
        rank: of this process.
        world_size: how many there are.
        buffer_size: see above, in bytes; 0 sends one tensor at a time.
        check: of rank 0, called while it waits for the others; what it raises ends the waiting.

    Raises:
        ToolkitError: the processes do not find each other within a minute.
    """

    def __init__(
        self, address: str, port: int, rank: int, world_size: int, buffer_size: int = BUFFER_SIZE,
        check: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self._rank, self._buffer_size = rank, buffer_size
        self._others = range(1, world_size)
        self._closed = False
        self._sent = 0  # buffers
        with _named(f"the group of {world_size} processes at {address}:{port} did not come together"):
            self._store = dist.TCPStore(address, port, is_master=rank == 0, timeout=_JOIN, wait_for_workers=False)
            self._meet("joined", check, _JOIN.total_seconds())
            store = dist.PrefixStore("gloo", self._store)
            self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, _TRANSFER)

    def send(self, tensors: Iterable[Tensor], check: Callable[[], object] = lambda: None) -> None:
        """Send tensors of rank 0, which are read one after another.

        Args:
            tensors: on any device.
            check: called while it waits for the others; what it raises ends the group.
        """
        for buffer in _packed((_bytes(one) for one in tensors), Tensor.numel, self._buffer_size):
            self._broadcast(torch.cat(buffer), check)

    def receive(self, described: Sequence[TensorInfo]) -> dict[str, Tensor]:
        """The tensors that rank 0 sends, by name, on the CPU."""
        found: dict[str, Tensor] = {}
        for infos in _packed(described, lambda info: info.nbytes, self._buffer_size):
            buffer = torch.empty(sum(info.nbytes for info in infos), dtype=torch.uint8)
            self._broadcast(buffer)
            for info, raw in zip(infos, buffer.split([info.nbytes for info in infos]), strict=True):
                found[info.name] = raw.clone().view(info.dtype).view(info.shape)
        return found

    def close(self) -> None:
        """Leave the group; who waits in it gets an error."""
        self._closed = True

    def _broadcast(self, buffer: Tensor, check: Callable[[], object] = lambda: None) -> None:
        if not buffer.numel():
            return
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._sent += 1
        try:
            with _named("weights were not passed on, since the other process ended or fell silent"):
                self._meet(f"buffer {self._sent}", check, _WAIT)
                self._group.broadcast([buffer], options).wait()
        except BaseException:
            self.close()
            raise

    def _meet(self, what: str, check: Callable[[], object], seconds: float) -> None:
        """Wait until all processes are there: rank 0 says so first, then the others do."""
        first, others = f"{what}/0", [f"{what}/{rank}" for rank in self._others]
        if self._rank:
            self._wait_for([first], check, seconds)
            self._store.set(f"{what}/{self._rank}", "")
            return
        self._store.set(first, "")
        self._wait_for(others, check, seconds)
        for key in (first, *others):
            self._store.delete_key(key)

    def _wait_for(self, keys: list[str], check: Callable[[], object], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._store.check(keys):
            check()
            if self._closed:
                raise RuntimeError("this process has left")
            if time.monotonic() > end:
                raise RuntimeError(f"nobody came within {seconds:.0f} s")
            time.sleep(_LOOK)


@contextmanager
def _named(failure: str) -> Iterator[None]:
    """ToolkitError for what torch.distributed raises."""
    try:
        yield
    except RuntimeError as error:
        raise ToolkitError(f"{failure}: {first_line(error)}.") from None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _packed(items: Iterable[Item], nbytes: Callable[[Item], int], buffer_size: int) -> Iterator[list[Item]]:
    """Items of one buffer after another."""
    pack: list[Item] = []
    size = 0
    for item in items:
        pack.append(item)
        size += nbytes(item)
        if size > buffer_size:
            yield pack
            pack, size = [], 0
    if pack:
        yield pack
