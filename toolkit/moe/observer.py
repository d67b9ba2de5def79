"""Who watches the routers of a thread's forwards, for statistics and losses."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor


class RouterObserver(Protocol):
    """Takes statistics of routers: see ``observing``."""

    def __call__(
        self, layer: int, logits: Tensor, ids: Tensor, multiplicity: Tensor | None, expert_bias: Tensor | None
    ) -> None: ...


class _Thread(threading.local):
    """There from the start, since compiled graphs depend on which attributes exist."""

    def __init__(self) -> None:
        self.observer: RouterObserver | None = None


_thread = _Thread()


@contextmanager
def observing(observer: RouterObserver | None) -> Iterator[None]:
    """Show ``observer`` what routers do in this thread's ragged forwards; None: nobody.

    A layer that activation checkpointing runs again, in the backward, is not shown again.
    """
    outer = _thread.observer
    _thread.observer = observer
    try:
        yield
    finally:
        _thread.observer = outer


def observe_router(
    layer: int, logits: Tensor, ids: Tensor, multiplicity: Tensor | None, expert_bias: Tensor | None
) -> None:
    """Show a router's work to who is ``observing`` this forward.

    Args:
        layer: index among the model's layers of experts.
        logits: [T, E].
        ids: [T, K] its choice.
        multiplicity: [T] how many samples each token stands for; None for one each.
        expert_bias: [E] the bias of the choice, where the router has one.
    """
    if _thread.observer is not None:
        _thread.observer(layer, logits, ids, multiplicity, expert_bias)
