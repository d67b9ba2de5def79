"""Observation of the routers of a thread's forwards, for statistics and auxiliary losses."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor


class RouterObserver(Protocol):
    """Receives what routers compute: see ``observe_router`` for the arguments."""

    def __call__(
        self, layer: int, logits: Tensor, topk_ids: Tensor, multiplicity: Tensor | None, expert_bias: Tensor | None
    ) -> None: ...


class _Thread(threading.local):
    """The attribute exists from the start, because compiled graphs depend on which attributes exist."""

    def __init__(self) -> None:
        self.observer: RouterObserver | None = None


_thread = _Thread()


@contextmanager
def observing(observer: RouterObserver | None) -> Iterator[None]:
    """Inside the block ``observer`` receives what routers compute in this thread's ragged forwards; None: nobody.

    A layer that activation checkpointing runs again, in the backward, is not observed again.
    """
    outer = _thread.observer
    _thread.observer = observer
    try:
        yield
    finally:
        _thread.observer = outer


def observe_router(
    layer: int, logits: Tensor, topk_ids: Tensor, multiplicity: Tensor | None, expert_bias: Tensor | None
) -> None:
    """Passes a router's results to the observer of this thread, if there is one.

    Args:
        layer: the index among the model's MoE layers.
        logits: [T, E].
        topk_ids: [T, K], the routing.
        multiplicity: [T], how many unshared samples each token stands for; None for ones.
        expert_bias: the bias of the selection, where the router has one.
    """
    if _thread.observer is not None:
        _thread.observer(layer, logits, topk_ids, multiplicity, expert_bias)
