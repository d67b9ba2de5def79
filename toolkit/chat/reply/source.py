"""Text that comes in parts, and the reading of it by generators, which yield where they need more.

A generator looks at the text the same way however it was cut: it decides nothing that more text could change. What is
read after ``keep`` may be given back with ``rewind``.
"""

import re
from collections.abc import Callable, Generator, Sequence

Reading = Generator[None, None, None]
"""Yields for more text."""
_SPACE = " \t\r\n"


class Malformed(Exception):
    """The text is no tool call in the syntax that it began in."""


class Source:
    """Text as it comes.

    Attributes:
        text: from the first character that may still be needed.
        at: index of the next character in ``text``.
        ended: whether no more comes.
    """

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False
        self._kept: int | None = None

    def feed(self, text: str) -> None:
        """Add text; what was read and is not kept is dropped."""
        first = self.at if self._kept is None else self._kept
        self.text = self.text[first:] + text
        self.at -= first
        if self._kept is not None:
            self._kept = 0

    def keep(self) -> None:
        """What is read from here on may be given back."""
        self._kept = self.at

    def release(self) -> None:
        """Nothing is given back."""
        self._kept = None

    def rewind(self) -> None:
        """Give back what was read since ``keep``; nothing without one."""
        if self._kept is not None:
            self.at, self._kept = self._kept, None

    @property
    def rest(self) -> str:
        return self.text[self.at :]

    @property
    def exhausted(self) -> bool:
        return self.at == len(self.text)

    def take(self, count: int) -> str:
        """The next characters, which are there."""
        taken = self.text[self.at : self.at + count]
        self.at += len(taken)
        return taken


def peek(source: Source) -> Generator[None, None, str]:
    """The next character, which is not read; "" at the end."""
    while source.exhausted and not source.ended:
        yield
    return source.text[source.at : source.at + 1]


def space(source: Source) -> Reading:
    """Read whitespace."""
    while (character := (yield from peek(source))) and character in _SPACE:
        source.at += 1


def literal(source: Source, options: Sequence[str]) -> Generator[None, None, str | None]:
    """Read the longest of ``options`` that comes next; None where none does."""
    while True:
        rest = source.text[source.at : source.at + max(map(len, options))]
        match = max((one for one in options if rest.startswith(one)), key=len, default=None)
        longer = any(len(one) > len(match or "") and one != rest and one.startswith(rest) for one in options)
        if longer and not source.ended:
            yield
            continue
        source.at += len(match or "")
        return match


def expect(source: Source, *options: str) -> Generator[None, None, str]:
    """Read one of ``options``. Raises Malformed where none comes next."""
    match = yield from literal(source, options)
    if match is None:
        raise Malformed
    return match


def held_back(text: str, markers: Sequence[str], start: int = 0) -> int:
    """Characters at the end of ``text`` from ``start`` that may be the beginning of a marker."""
    longest = min(max(map(len, markers), default=1) - 1, len(text) - start)
    for count in range(longest, 0, -1):
        end = text[len(text) - count :]
        if any(len(one) > count and one.startswith(end) for one in markers):
            return count
    return 0


def earliest(text: str, markers: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """(index, marker) of the first marker in ``text``, the longest of several."""
    matches = [(at, -len(one), one) for one in markers if (at := text.find(one, start)) >= 0]
    return (min(matches)[0], min(matches)[2]) if matches else None


def until(source: Source, markers: Sequence[str], write: Callable[[str], None]) -> Generator[None, None, str | None]:
    """Read up to a marker and the marker; the marker, or None where the text ends without one.

    Args:
        write: gets the text before the marker, in parts.
    """
    while True:
        match = earliest(source.text, markers, source.at)
        if match is not None:
            at, marker = match
            may_grow = any(one != marker and one.startswith(source.text[at:]) for one in markers)
            if at > source.at:
                write(source.take(at - source.at))
            if not may_grow or source.ended:
                source.at += len(marker)
                return marker
        else:
            held = 0 if source.ended else held_back(source.text, markers, source.at)
            if len(source.text) - held > source.at:
                write(source.take(len(source.text) - held - source.at))
            if source.ended:
                return None
        yield


def collect(source: Source, markers: Sequence[str]) -> Generator[None, None, tuple[str, str]]:
    """(the text up to a marker, the marker), both read. Raises Malformed where the text ends without one."""
    parts: list[str] = []
    marker = yield from until(source, markers, parts.append)
    if marker is None:
        raise Malformed
    return "".join(parts), marker


_NAME = re.compile(r"[^\s\"'<>{}()\[\]|,;=]{1,256}")


def checked_name(text: str) -> str:
    """A function's name without whitespace around it. Raises Malformed where it can be none."""
    name = text.strip()
    if not _NAME.fullmatch(name):
        raise Malformed
    return name


def short_name(source: Source, markers: Sequence[str]) -> Generator[None, None, tuple[str, str]]:
    """(a function's name, the marker behind it). Raises Malformed as soon as the text cannot be one."""
    parts: list[str] = []

    def write(text: str) -> None:
        parts.append(text)
        if sum(map(len, parts)) > 512:
            raise Malformed
        if "".join(parts).strip():
            checked_name("".join(parts))

    marker = yield from until(source, markers, write)
    if marker is None:
        raise Malformed
    return checked_name("".join(parts)), marker
