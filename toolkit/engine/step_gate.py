"""Who keeps the engine's thread from stepping, and until when."""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")


class StepGate:
    """Whether steps may run. Whoever closes it waits until the step in progress has ended.

    Args:
        changed: the condition of the engine's thread, which is notified when steps may run again.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._pauses = 0
        self._stepping = self._held = False
        self._one_pause = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether no step may run."""
        return self._pauses > 0

    @property
    def held(self) -> bool:
        """Whether ``hold`` is in effect."""
        return self._held

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """No step runs inside. Several threads pause one after the other."""
        with self._changed:
            self._pauses += 1
        try:
            with self._one_pause:
                with self._changed:
                    self._changed.wait_for(lambda: not self._stepping)
                yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    def hold(self) -> None:
        """No step runs until ``release``. Does nothing when held."""
        with self._changed:
            if not self._held:
                self._held = True
                self._pauses += 1
            self._changed.wait_for(lambda: not self._stepping)

    def release(self) -> None:
        """End ``hold``. Does nothing when not held."""
        with self._changed:
            if self._held:
                self._held = False
                self._pauses -= 1
                self._changed.notify_all()

    def enter(self, anyway: bool = False) -> bool:
        """Begin a step where that may run, or ``anyway``; whether it may. For the engine's thread."""
        with self._changed:
            self._stepping = anyway or not self._pauses
            return self._stepping

    def leave(self) -> None:
        """End a step."""
        with self._changed:
            self._stepping = False
            self._changed.notify_all()


class Gated(ABC):
    """What the owner of an engine's thread offers to those who keep it from stepping.

    Attributes:
        engine: whose steps the thread runs.
    """

    engine: Any
    _gate: StepGate

    @abstractmethod
    def call(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns on the thread, between two steps. Waits for it."""

    def synchronize(self) -> None:
        """Wait until no step is in flight: one that was launched and whose results are not delivered."""
        return

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """No step runs inside, and none is in flight, so that weights may be written.

        Several threads pause one after the other.
        """
        with self._gate.pause():
            self.synchronize()
            yield

    def pause_generation(self) -> None:
        """Run no step until ``resume_generation``. Requests keep what they have, and new ones wait."""
        self._gate.hold()
        self.synchronize()

    def resume_generation(self) -> None:
        """Continue after ``pause_generation``."""
        self._gate.release()

    @property
    def generation_paused(self) -> bool:
        """Whether ``pause_generation`` is in effect."""
        return self._gate.held

    def sleep(self) -> None:
        """The engine's ``sleep`` between two steps."""
        self.call(self.engine.sleep)

    def wake(self) -> None:
        """The engine's ``wake``."""
        self.call(self.engine.wake)
