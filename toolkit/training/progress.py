"""Progress of a run: a bar on a terminal, a plain line at intervals elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

T = TypeVar("T")
_live: list[Any] = []
"""What has a bar on the terminal: there is room for one."""


class Progress:
    """Shows step, one metric (such as the loss), tokens per second and time left.

    On a terminal a live bar; elsewhere one line every ``seconds`` seconds and for the last step; silent if not
    ``shown``.
    """

    def __init__(self, steps: int, done: int, seconds: float, shown: bool = True, name: str = "loss") -> None:
        self._name = name
        self._steps, self._first, self._seconds, self._shown = steps, done, seconds, shown
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if shown and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(name + " {task.fields[value]:.3f}  {task.fields[rate]:,.0f} tokens/s  left"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, value=float("nan"), rate=0.0)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            _live.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            _live.remove(self)

    def update(self, step: int, value: float, rate: float) -> None:
        """After step ``step`` (1-based): the metric, and the rate in tokens per second."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, value=value, rate=rate)
            return
        now = time.monotonic()
        if self._shown and (now - self._last >= self._seconds or step == self._steps):
            self._last = now
            left = (now - self._start) / (step - self._first) * (self._steps - step)
            print(
                f"step {step}/{self._steps}  {self._name} {value:.3f}  {rate:,.0f} tokens/s  {_clock(left)} left",
                flush=True,
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Shown(NamedTuple):
    """How what takes long is shown.

    Args:
        seconds: between two lines, where there is no terminal.
        log: prints a line.
    """

    seconds: float
    log: Callable[[str], None]


_SHOWN: ContextVar[Shown | None] = ContextVar("_SHOWN", default=None)


@contextmanager
def showing(seconds: float, log: Callable[[str], None] | None) -> Iterator[None]:
    """Inside, ``counted`` and ``Count`` show what takes long; nothing where ``log`` is None."""
    token = _SHOWN.set(None if log is None else Shown(seconds, log))
    try:
        yield
    finally:
        _SHOWN.reset(token)


class Count:
    """How many of something are done, shown while it takes long: a bar on a terminal, elsewhere lines at intervals.

    Args:
        total: of them; None where it is not known.
        name: what is done, e.g. ``data: lines checked``.
        shown: how; None shows nothing.
    """

    def __init__(self, total: int | None, name: str, shown: Shown | None) -> None:
        self._name, self._total, self._shown = name, total, shown
        self._begun = self._last = time.monotonic()
        self._bar: Any = None

    def update(self, done: int) -> None:
        """So many are done."""
        if self._shown is None:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(0, completed=done)
        elif now - self._last >= self._shown.seconds:
            self._last = now
            of = "" if self._total is None else f" of {self._total:,}"
            self._shown.log(f"{self._name}: {done:,}{of}, {now - self._begun:.0f} s")
        if self._bar is None and not _live and sys.stdout.isatty() and now - self._begun > 1.0:
            self._bar = _bar(self._name, self._total)
            _live.append(self)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            _live.remove(self)
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def count_shown(total: int | None, name: str) -> Count:
    """A ``Count`` that is shown within ``showing``."""
    return Count(total, name, _SHOWN.get())


def counted(items: Iterable[T], total: int | None, name: str) -> Iterator[T]:
    """The items, which are counted and shown within ``showing``."""
    with count_shown(total, name) as done:
        for at, item in enumerate(items, 1):
            yield item
            done.update(at)


def _bar(name: str, total: int | None) -> Any:
    """A bar of one task that has begun."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar.add_task(name, total=total)
    bar.start()
    return bar
