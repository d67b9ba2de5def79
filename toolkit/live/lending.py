"""Training that lends the engine its thread back at borders of its work, so that no decode step waits long."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from toolkit.engine import AsyncEngine

Result = TypeVar("Result")

Border = Callable[[Hashable, Tensor], None]
"""Called with a name of the work that follows, and what was computed: a border now, and before its backward."""


class Lending:
    """Runs forwards and backwards on another thread while the engine's thread waits, one of both at a time.

    A border is the end of a module's forward, the beginning of its backward, and wherever the function says so. There
    the engine runs a step where a request decodes and the work up to the next border, with the step after it, would
    make that one's tokens come later than ``max_wait`` seconds after the last. Steps and training share weights, which
    neither writes meanwhile, and nothing else: another thread has no forward context, grad mode or batch-invariant
    functions of the first. What changes modules or weights waits for the whole of the function, as all commands do.

    Args:
        engine: whose thread is lent.
        max_wait: seconds.
    """

    def __init__(self, engine: AsyncEngine, max_wait: float) -> None:
        self._engine, self._max_wait = engine, max_wait
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="forward-backward")
        self._border, self._continue = threading.Semaphore(0), threading.Semaphore(0)
        self._durations = _Durations()
        self._step_seconds = self._last_step = self._last_border = 0.0

    def run(self, function: Callable[[Border], Result], size: int) -> Result:
        """What ``function`` returns, between two steps and with steps inside. Waits for it.

        Args:
            function: is given a further border to call.
            size: of its work, to which the time between two borders is proportional: tokens.
        """
        return self._engine.call(lambda: self._lend(function, size))

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown()

    def _lend(self, function: Callable[[Border], Result], size: int) -> Result:
        self._engine.engine.see_weights()  # what it rebuilds after new adapters is not rebuilt inside
        self._last_step = time.perf_counter()
        self._durations.begin(size)
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
                now = time.perf_counter()
                self._step_seconds, self._last_step = now - self._last_border, now
            self._continue.release()
        if failure is not None:
            raise failure
        return future.result()

    def _watched(self, function: Callable[[Border], Result]) -> Result:
        with _at_borders(self._at_border) as border:
            return function(border)

    def _at_border(self, following: Hashable) -> None:
        coming = self._durations.end(following)
        # A step that took long, of a prompt say, does not say how long the next one takes.
        coming += min(self._step_seconds, self._max_wait / 2)
        self._last_border = time.perf_counter()
        if self._last_border - self._last_step + coming >= self._max_wait and self._engine.engine.has_work:
            self._border.release()
            self._continue.acquire()
            self._durations.resume()


class _Durations:
    """How long work took from one border to the next, by what follows a border: rises at once, falls slowly."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}  # of one token
        self._running: Hashable = None
        self._size = 1
        self._since = 0.0

    def begin(self, size: int) -> None:
        """Work of another size begins."""
        self._running, self._size = None, max(size, 1)
        self.resume()

    def resume(self) -> None:
        """The time from now on counts."""
        self._since = time.perf_counter()

    def end(self, following: Hashable) -> float:
        """End what runs; the seconds that what follows is expected to take, 0 where it never ran."""
        now = time.perf_counter()
        took = (now - self._since) / self._size
        known = self._seconds.get(self._running, took)
        self._seconds[self._running] = max(took, known + _FALL * (took - known))
        self._running, self._since = following, now
        return self._seconds.get(following, 0.0) * self._size


_FALL = 0.25


@contextmanager
def _at_borders(function: Callable[[Hashable], None]) -> Iterator[Border]:
    """Inside, ``function`` is called after the forward of every module in this thread, and before its backward.

    A hook of all modules: those of a module's own would keep steps from being captured.
    """
    thread = threading.get_ident()

    def border(name: Hashable, output: Tensor) -> None:
        function((name, False))
        if output.requires_grad:
            output.register_hook(lambda gradient: function((name, True)))

    def after_forward(module: nn.Module, arguments: Any, output: Any) -> None:
        if threading.get_ident() != thread:  # a step's
            return
        if type(output) is Tensor:  # deferred logits would be computed for a hook
            border(id(module), output)
        else:
            function((id(module), False))

    handle = register_module_forward_hook(after_forward)
    try:
        yield border
    finally:
        handle.remove()
