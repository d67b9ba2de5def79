"""Progress of a run: a bar on a terminal, a plain line at intervals elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

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


def tracked(
    items: Iterable[T], total: int | None, name: str, seconds: float, log: Callable[[str], None] | None = print
) -> Iterator[T]:
    """The items, while what takes long is shown: a bar on a terminal, elsewhere a line every ``seconds`` seconds.

    Args:
        total: number of items; None where it is not known.
        name: what is done, e.g. ``data: lines checked``.
        log: prints a line; None shows nothing.
    """
    begun = last = time.monotonic()
    bar, of = None, "" if total is None else f" of {total:,}"
    try:
        for at, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if bar is not None:
                bar.update(0, completed=at)
            elif log is not None and now - last >= seconds:
                last = now
                log(f"{name}: {at:,}{of}, {now - begun:.0f} s")
            if bar is None and log is not None and sys.stdout.isatty() and now - begun > 1.0:
                bar = _bar(name, total)
    finally:
        if bar is not None:
            bar.stop()


def _bar(name: str, total: int | None) -> Any:
    """A bar of one task that has begun."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar.add_task(name, total=total)
    bar.start()
    return bar
