"""A JSON lines file as a sequence that is read from disk, every line checked once.

Lines end with a line feed, as the format has it; other characters that some tools take for line ends (U+2028, U+0085, a
form feed) are text. A byte order mark at the beginning of a line and a carriage return at its end are left out, blank
lines passed over. Memory holds 16 bytes per line.
"""

import hashlib
import json
import re
import shutil
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple, cast, overload

from toolkit.errors import ToolkitError, first_line
from toolkit.training.corpus import digest
from toolkit.training.progress import counted

FIELD = "objective.data_files"
SHOWN = 5
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_OTHER_FORMATS = {
    b"PAR1": "parquet",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
    b"ARROW1": "arrow",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}


class Line(NamedTuple):
    """A line's number, from 1, its object, and the file or dataset that it is of."""

    number: int
    value: dict[str, Any]
    path: str = ""


class BadLine(NamedTuple):
    """A line that cannot be trained on: its number, why, as the rest of a sentence: ``must be ..., got ...``, and the
    file or dataset that it is of."""

    number: int
    reason: str
    path: str = ""


class LineSequence(Sequence[Line]):
    """Lines that are read when they are asked for."""

    @abstractmethod
    def read(self, at: int) -> Line:
        """The line at an index, which may be counted from the end. Raises IndexError where there is none."""

    @overload
    def __getitem__(self, at: int) -> Line: ...
    @overload
    def __getitem__(self, at: slice) -> list[Line]: ...
    def __getitem__(self, at: int | slice) -> Line | list[Line]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        return self.read(at)


class LineIndex(LineSequence):
    """Lines of an open file at the given offsets; each is read when it is asked for."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file, self._path = file, path
        self._offsets, self._numbers = array("q"), array("q")

    def add(self, offset: int, number: int) -> None:
        self._offsets.append(offset)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, at: int) -> Line:
        self._file.seek(self._offsets[at])
        return Line(self._numbers[at], json.loads(_text(self._file.readline())), self._path)


class JsonlDataset:
    """The lines of a file, plain or gzip, split into training and held out by a hash of each line.

    Args:
        path: of the file.
        val_set_size: expected share of the lines that is held out.
        check: raises ToolkitError for an object that is no example.
        on_bad_lines: ``error`` or ``skip``.
        field: of the recipe, for errors.

    Attributes:
        name: what errors call it.
        bad: the lines that are skipped.
        fingerprint: a hash of the file.

    Raises:
        ToolkitError: no such file, another format, no line to train on, or, with ``error``, bad lines, the first few by
            number.
    """

    def __init__(
        self,
        path: str,
        val_set_size: float,
        check: Callable[[dict[str, Any]], None],
        on_bad_lines: str = "error",
        field: str = FIELD,
    ) -> None:
        self.name = f"{field} '{path}'"
        self._file = _opened(path, field)
        self.train, self.held_out = LineIndex(self._file, path), LineIndex(self._file, path)
        self.bad: list[BadLine] = []
        seen = hashlib.sha256()
        threshold, offset = int(val_set_size * 2**64), 0
        for number, raw in enumerate(counted(self._file, None, f"data: lines of {path} indexed"), 1):
            seen.update(raw)
            try:
                text = _text(raw)
                if text.strip():
                    check(parse_object(text))
                    side = self.held_out if digest(text) < threshold else self.train
                    side.add(offset, number)
            except ToolkitError as error:
                self.bad.append(BadLine(number, str(error), path))
            offset += len(raw)
        self.fingerprint = seen.hexdigest()
        if on_bad_lines == "error" and self.bad:
            raise bad_lines_error(self.name, self.bad)
        if not self.train:
            skipped = f", of which {len(self.bad)} lines are skipped ({shown(self.bad)})" if self.bad else ""
            if self.held_out:
                skipped += f", of which evaluation.val_set_size {val_set_size} holds out {len(self.held_out)} lines"
            raise ToolkitError(f"{field} must have a line to train on, got '{path}'{skipped}.")


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that a line is. Raises ToolkitError: ``must be ...``, without a subject."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ToolkitError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at character {error.pos + 1}"
        raise ToolkitError(f"must be a JSON object ({reason}).") from None
    if not isinstance(value, dict):
        raise ToolkitError(f"must be a JSON object, got {kind_of(value)}.")
    if _SURROGATE.search(text):  # nothing else gives one: the text was UTF-8
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ToolkitError(f"must be Unicode without lone surrogates, got U+{code:04X}.") from None
    return value


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def bad_lines_error(name: str, bad: Sequence[BadLine]) -> ToolkitError:
    """One sentence on all bad lines of what is called ``name``, the first few by number."""
    return ToolkitError(
        f"{name}, {shown(bad)}. Mend the file, or pass over such lines with objective.on_bad_lines=skip."
    )


def shown(bad: Sequence[BadLine]) -> str:
    """Why lines are bad, the most frequent reasons, each with the numbers of the first few."""
    reasons: dict[tuple[str, str], list[int]] = {}
    several = len({path for _, _, path in bad}) > 1
    for number, reason, path in bad:
        reasons.setdefault((reason.rstrip("."), f" of '{path}'" if several else ""), []).append(number)
    listed = sorted(reasons.items(), key=lambda item: -len(item[1]))
    texts = []
    for (reason, of), numbers in listed[:SHOWN]:
        more = f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else ""
        which = ("line " if len(numbers) == 1 else "lines ") + ", ".join(map(str, numbers[:SHOWN])) + more + of
        texts.append(f"{which}{',' if reason.startswith('must ') else ':'} {reason}")
    others = sum(len(numbers) for _, numbers in listed[SHOWN:])
    return "; ".join(texts) + (f"; {others:,} others" if others else "")


def _text(raw: bytes) -> str:
    try:
        return raw.removeprefix(_BOM).removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ToolkitError(f"must be UTF-8, got byte 0x{raw[error.start]:02X}.") from None


def _opened(path: str, field: str) -> IO[bytes]:
    """The file, uncompressed, open where it can be sought."""
    try:
        file: IO[bytes] = open(path, "rb")  # noqa: SIM115 (lives as long as the data set)
        begin = file.read(8)
        file.seek(0)
    except OSError as error:
        raise ToolkitError(f"{field} must be a json lines file, got '{path}' ({error.strerror}).") from None
    for magic, name in _OTHER_FORMATS.items():
        if begin.startswith(magic):
            raise ToolkitError(f"{field} must be a json lines file, plain or gzip, got '{path}' ({name}).")
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ToolkitError(f"{field} must be a json lines file in UTF-8, got '{path}' (UTF-16).")
    if begin.removeprefix(_BOM).lstrip().startswith(b"["):
        raise ToolkitError(f"{field} must be a json lines file, an object on each line, got '{path}' (an array).")
    return _unzipped(file, path, field) if begin.startswith(b"\x1f\x8b") else file


def _unzipped(file: IO[bytes], path: str, field: str) -> IO[bytes]:
    """A copy on disk that vanishes with the process: gzip cannot be sought."""
    import gzip
    import zlib

    whole = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with file, gzip.open(file) as packed:
            shutil.copyfileobj(cast(IO[bytes], packed), whole, 1 << 20)
    except (OSError, EOFError, zlib.error) as error:
        raise ToolkitError(f"{field} '{path}' must be a whole gzip file ({first_line(error)}).") from None
    whole.seek(0)
    return whole


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:at]))
        raise ToolkitError(f"must have each key once, got '{twice}' twice.")
    return found


def _no_constant(name: str) -> Any:
    raise ToolkitError(f"must be JSON, which has no {name}.")
