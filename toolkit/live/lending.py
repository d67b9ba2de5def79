"""Training that lends the engine its thread back at the borders of modules, so that no decode step waits long."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from toolkit.engine import AsyncEngine

Result = TypeVar("Result")


class Lending:
    """Runs forwards and backwards on another thread while the engine's thread waits, one of both at a time.

    At the border of a module, forward or backward, where a request decodes and waits for ``max_wait`` seconds already,
    the engine runs a step. Steps and training share weights, which neither writes meanwhile, and nothing else: another
    thread has no forward context, grad mode or batch-invariant functions of the first. What changes modules or weights
    waits for the whole of the function, as all commands do.

    Args:
        engine: whose thread is lent.
        max_wait: seconds.
    """

    def __init__(self, engine: AsyncEngine, max_wait: float) -> None:
        self._engine, self._max_wait = engine, max_wait
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="forward-backward")
        self._border, self._continue = threading.Semaphore(0), threading.Semaphore(0)
        self._last_step = 0.0

    def run(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns, between two steps and with steps inside. Waits for it."""
        return self._engine.call(lambda: self._lend(function))

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown()

    def _lend(self, function: Callable[[], Result]) -> Result:
        self._engine.engine.see_weights()  # what it rebuilds after new adapters is not rebuilt inside
        self._last_step = time.perf_counter()
        future = self._executor.submit(self._watched, function)
        future.add_done_callback(lambda _: self._border.release())
        failure: BaseException | None = None
        while True:
            self._border.acquire()
            if future.done():
                break
            if failure is None:
                try:
                    self._engine.step_within()
                except BaseException as error:  # the function ends first
                    failure = error
                self._last_step = time.perf_counter()
            self._continue.release()
        if failure is not None:
            raise failure
        return future.result()

    def _watched(self, function: Callable[[], Result]) -> Result:
        with _at_borders(self._at_border):
            return function()

    def _at_border(self) -> None:
        waited = time.perf_counter() - self._last_step
        if waited >= self._max_wait and self._engine.engine.has_work:
            self._border.release()
            self._continue.acquire()


@contextmanager
def _at_borders(function: Callable[[], None]) -> Iterator[None]:
    """Inside, ``function`` is called after the forward of every module in this thread, and before its backward.

    A hook of all modules: those of a module's own would keep steps from being captured.
    """
    thread = threading.get_ident()

    def after_forward(module: nn.Module, arguments: Any, output: Any) -> None:
        if threading.get_ident() != thread:  # a step's
            return
        function()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: function())

    handle = register_module_forward_hook(after_forward)
    try:
        yield
    finally:
        handle.remove()
