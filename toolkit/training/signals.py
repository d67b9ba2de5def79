"""SIGINT, SIGTERM and SIGHUP stop a run where nothing is lost, and tell how it resumes."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FORWARDED = 5.0
"""Seconds in which a launcher of several processes hands on the signal that its process group got already."""
_UNHANDLED = 3.0
"""Seconds that native code, such as the training of a tokenizer, may keep Python from handling a signal."""


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the run. What was to be saved has been saved.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status of a process that it stopped: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum


class StopRequest:
    """The first SIGINT, SIGTERM or SIGHUP asks the run to stop; the second one ends the process at once.

        with StopRequest() as stop:
            train(recipe, stop=stop)

    The first raises ``Interrupted`` in the main thread, or where the run has ``deferred`` it, is noted: the loop then
    saves a checkpoint at its next step boundary and raises ``Interrupted`` itself. A SIGHUP that whoever started the
    process has it ignore (``nohup``) stays ignored. A terminal, or a reader of the output, that goes away ends nothing:
    what is said goes nowhere from then on. Where it was not entered it handles none of these.

    Args:
        notify: tells the user how the run resumes; called once, by the main process of a run that has stopped.

    Attributes:
        signum: the signal that asked; None before.
        started: whether the folder of the run is the run's already, so that it resumes; set by the run.
    """

    def __init__(self, notify: Callable[[], None] | None = None) -> None:
        self.signum: int | None = None
        self.started = False
        self._notify = notify
        self._deferred, self._handled = 0, threading.Event()
        self._launched = "LOCAL_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
        self._before: dict[int, Any] = {}
        self._streams = sys.stdout, sys.stderr

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python hands signals to the main thread alone
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="signals").start()
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Unbroken(stream) for stream in self._streams)
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [number for number in SIGNALS if number is not signal.SIGHUP or not ignored]
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        for number, before in self._before.items():
            signal.signal(number, before)
        sys.stdout, sys.stderr = self._streams
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # ends the watching thread

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def accept(self, signum: int) -> None:
        """Note that the run is to stop, as another process was asked to."""
        if self.signum is None:
            self.signum = signum
            self._handled.set()

    def announce(self) -> None:
        """Call ``notify``, once."""
        notify, self._notify = self._notify, None
        if notify is not None:
            notify()

    def interruption(self) -> Interrupted:
        """The exception for the signal that asked; SIGTERM's where it was another process that got one."""
        return Interrupted(self.signum or signal.SIGTERM)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal is noted and nothing is raised; whoever enters looks at ``requested``."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.accept(signum)
            if not self._deferred:
                raise Interrupted(signum)
            if os.environ.get("RANK", "0") == "0":
                # Not print: the handler may have interrupted one.
                text = f"{signal.Signals(signum).name}: a checkpoint is saved at the next step boundary"
                with suppress(OSError):
                    os.write(2, f"\n{text}; again to stop at once\n".encode())

    def _watch(self) -> None:
        """See every signal as it comes, while the main thread is in native code too."""
        first: float | None = None
        while received := os.read(self._read, 1):
            signum = received[0]
            if signum not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                threading.Thread(target=self._end_unhandled, args=(signum,), daemon=True).start()
            elif not self._launched or time.monotonic() - first > _FORWARDED:
                os._exit(128 + signum)
        os.close(self._read)

    def _end_unhandled(self, signum: int) -> None:
        if not self._handled.wait(_UNHANDLED) and not self._deferred:
            self.announce()
            os._exit(128 + signum)


class _Unbroken:
    """A stream whose reader, terminal or disk may go away: what cannot be written is lost, and nothing is raised."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Write to nowhere from now on, what is buffered too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
