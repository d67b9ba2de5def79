"""An event loop on a thread, for asynchronous functions of users: rewards, tools and environments."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any


class BackgroundLoop:
    """Runs coroutines on a thread that is started by the first one and lives as long as the process.

    One loop for a whole run: connections that a function keeps between its calls stay usable. It is another thread's,
    so a run may also be started where a loop runs already, as in a notebook.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Start a coroutine; its result is the future's."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(self._loop,), name="toolkit-functions", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop, which a function that exits stops; its future has that, and the others continue."""
    while True:
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


LOOP = BackgroundLoop()
"""The process's."""


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call of ``function`` returns a coroutine: of a function, or of an object with such a ``__call__``."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
