"""The context of the forward that runs: from the keyword that travels through the model, or of the thread.

Keyword first: activation checkpointing runs layers again on another thread, where nothing is set.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from toolkit.state.context import ForwardContext

KEYWORD = "ragged"
"""The keyword by which a ``ForwardContext`` travels through transformers' forwards."""


class _Thread(threading.local):
    """There from the start, since compiled graphs depend on which attributes exist."""

    def __init__(self) -> None:
        self.context: ForwardContext | None = None


_thread = _Thread()


@contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Make ``context`` this thread's, for models that drop keywords on the way down; nests."""
    outer = _thread.context
    _thread.context = context
    try:
        yield context
    finally:
        _thread.context = outer


def get_forward_context() -> ForwardContext | None:
    """The context of this thread's innermost ``set_forward_context``, or None."""
    return _thread.context


def forward_context_of(kwargs: Mapping[str, Any]) -> ForwardContext | None:
    """The context of a module's call: from its keywords, else this thread's; None for an ordinary call."""
    context: ForwardContext | None = kwargs.get(KEYWORD)
    return context if context is not None else _thread.context
