"""What an objective on given examples reads: a file, or several datasets one behind the other."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol, cast

from toolkit.config.objective import DatasetSection, LinesSection
from toolkit.errors import ToolkitError
from toolkit.training.corpus import digest
from toolkit.training.examples import LineStream, Stream
from toolkit.training.jsonl import BadLine, JsonlDataset, Line, LineSequence, bad_lines_error
from toolkit.training.rows import RowDataset, text_of_row
from toolkit.training.streamed import FIRST_LINES, ShuffledStream, StreamOfRows, open_stream

_JSON_LINES = (".jsonl", ".ndjson", ".gz")


class Source(Protocol):
    """One file or dataset, its lines split into training and held out."""

    name: str
    bad: list[BadLine]
    fingerprint: str

    @property
    def train(self) -> Sequence[Line]:
        """Lines to train on."""

    @property
    def held_out(self) -> Sequence[Line]:
        """The others."""


class Joined(LineSequence):
    """Lines of several sequences one behind the other, as ``read`` makes them."""

    def __init__(self, parts: Sequence[Sequence[Line]], read: Sequence[Callable[[Line], Line]]) -> None:
        self._parts, self._read = parts, read
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, at: int) -> Line:
        at = range(len(self))[at]
        part = next(index for index, end in enumerate(self._ends) if at < end)
        begin = self._ends[part] - len(self._parts[part])
        return self._read[part](self._parts[part][at - begin])


class GivenLines:
    """All lines of an objective.

    Attributes:
        name: what errors call it.
        train, held_out: lines.
        shares: (lines to train on, weight) of each source.
        bad: lines that are skipped.
        fingerprint: a hash of what is read.
        streamed: whether ``train`` has the first lines alone.
    """

    streamed = False

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        sections: Sequence[DatasetSection | None],
        evaluated: Sequence[tuple[Source, DatasetSection]] = (),
    ) -> None:
        parts = [_first(source.train, section) for source, section in zip(sources, sections)]
        reads = [_reader(section) for section in sections]
        self.name, self.bad = name, [line for source in sources for line in source.bad]
        self.train: Sequence[Line] = Joined(parts, reads)
        self.shares = [(len(part), 1.0 if one is None else one.weight) for part, one in zip(parts, sections)]
        self.held_out: Sequence[Line] = (
            _joined(evaluated) if evaluated else Joined([source.held_out for source in sources], reads)
        )
        prints = [source.fingerprint for source in [*sources, *(source for source, _ in evaluated)]]
        self.fingerprint = prints[0] if len(prints) == 1 and sections[0] is None else repr((prints, sections))

    def describe(self, what: str) -> str:
        """A line on them; ``what`` they are called."""
        skipped = f", {len(self.bad)} skipped" if self.bad else ""
        return f"{len(self.train)} {what} to train on, {len(self.held_out)} held out{skipped}"

    def stream(self, seed: int, rank: int = 0, world_size: int = 1) -> Stream:
        """A process's share of the lines to train on, endless, in an order of the seed."""
        return LineStream(self.train, seed, rank=rank, world_size=world_size, shares=self.shares)

    def firsts(self) -> Iterator[Line]:
        """The first line to train on of every source."""
        first = 0
        for count, _ in self.shares:
            if count:
                yield self.train[first]
            first += count


class StreamedLines(GivenLines):
    """One dataset that is read as it is trained on. Only its first lines are looked at beforehand.

    Args:
        section: of the dataset.
        check: raises ToolkitError for an object that is no example.
        val_set_size: expected share of the lines that is not trained on; those among the first lines are held out.
        held_out: lines of other datasets, in their place.
        on_bad_lines: ``error`` or ``skip``, of the first lines.
    """

    streamed = True

    def __init__(
        self,
        section: DatasetSection,
        check: Callable[[Mapping[str, Any]], None],
        val_set_size: float,
        held_out: Sequence[Line] | None,
        on_bad_lines: str,
    ) -> None:
        self.name = f"objective.datasets[0] '{section.path}'"
        self._section, self._read = section, _reader(section)
        self._threshold = 0 if held_out is not None else int(val_set_size * 2**64)
        self.bad = []
        train: list[Line] = []
        held: list[Line] = []
        seen = hashlib.sha256(repr(section).encode())
        for line in islice(StreamOfRows(open_stream(section, "objective.datasets[0]"), section.path), FIRST_LINES):
            seen.update(text_of_row(line.value).encode("utf-8", "surrogatepass"))
            try:
                check(self._read(line).value)
            except ToolkitError as error:
                self.bad.append(BadLine(line.number, str(error), section.path))
                continue
            (train if self._trained(line) else held).append(self._read(line))
        self.train, self.held_out = train, held if held_out is None else held_out
        self.shares, self.fingerprint = [(len(train), 1.0)], seen.hexdigest()
        if self.bad and on_bad_lines == "error":
            raise bad_lines_error(self.name, self.bad)
        if not train:
            raise ToolkitError(f"{self.name} must have a line to train on, got none.")

    def _trained(self, line: Line) -> bool:
        return digest(text_of_row(line.value)) >= self._threshold

    def describe(self, what: str) -> str:
        held = f", {len(self.held_out)} held out" if self.held_out else ""
        return f"a stream of {what}{held}"

    def stream(self, seed: int, rank: int = 0, world_size: int = 1) -> Stream:
        return ShuffledStream(
            lambda: StreamOfRows(open_stream(self._section, "objective.datasets[0]"), self._section.path),
            self._trained, self._read, seed, self._section.shuffle_buffer_size, rank, world_size,
        )  # fmt: skip


def open_lines(section: LinesSection, check: Callable[[Mapping[str, Any]], None]) -> GivenLines | None:
    """The lines of ``data_files`` or of ``datasets``; None of a task.

    Args:
        check: raises ToolkitError for an object that is no example.

    Raises:
        ToolkitError: for what cannot be opened, has nothing to train on, or bad lines that the recipe does not skip.
    """
    share = section.evaluation.val_set_size
    if section.data_files is not None:
        file = JsonlDataset(section.data_files, share, check, section.on_bad_lines)
        return GivenLines(file.name, [file], [None])
    if section.datasets is None:
        return None
    evaluated = [
        (_opened(one, f"objective.eval_datasets[{at}]", 0.0, check, section.on_bad_lines), one)
        for at, one in enumerate(section.eval_datasets or ())
    ]
    if section.datasets[0].streaming:
        return StreamedLines(
            section.datasets[0], check, share, _joined(evaluated) if evaluated else None,
            section.on_bad_lines,
        )  # fmt: skip
    sources = [
        _opened(one, f"objective.datasets[{at}]", 0.0 if evaluated else share, check, section.on_bad_lines)
        for at, one in enumerate(section.datasets)
    ]
    name = sources[0].name if len(sources) == 1 else "objective.datasets"
    found = GivenLines(name, sources, section.datasets, evaluated)
    if not sum(round(count * weight) for count, weight in found.shares):
        raise ToolkitError(f"{name} must have a line to train on, got none.")
    return found


def _opened(
    section: DatasetSection,
    field: str,
    val_set_size: float,
    check: Callable[[Mapping[str, Any]], None],
    on_bad_lines: str,
) -> Source:
    read = _columns(section)

    def check_renamed(line: Mapping[str, Any]) -> None:
        check(read(line))

    path = section.path
    if os.path.isfile(path) and path.lower().endswith(_JSON_LINES):
        return JsonlDataset(path, val_set_size, check_renamed, on_bad_lines, f"{field}.path")
    return RowDataset(section, field, val_set_size, check_renamed, on_bad_lines)


def folder_of(path: str) -> Path:
    """What paths of images in the lines of a file or dataset are relative to."""
    return Path(path) if os.path.isdir(path) else Path(path).parent


def _joined(sources: Sequence[tuple[Source, DatasetSection]]) -> Joined:
    """All lines of datasets."""
    return Joined(
        [_first(source.train, section) for source, section in sources], [_reader(section) for _, section in sources]
    )


def _first(lines: Sequence[Line], section: DatasetSection | None) -> Sequence[Line]:
    """The lines that ``max_samples`` leaves: those with the smallest hashes of their numbers, in order."""
    most = None if section is None else section.max_samples
    if most is None or len(lines) <= most:
        return lines
    kept = sorted(sorted(range(len(lines)), key=lambda at: digest(f"max_samples/{at}"))[:most])
    return Chosen(lines, kept)


class Chosen(LineSequence):
    """Some lines of a sequence."""

    def __init__(self, lines: Sequence[Line], kept: Sequence[int]) -> None:
        self._lines, self._kept = lines, kept

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, at: int) -> Line:
        return self._lines[self._kept[at]]


def _columns(section: DatasetSection | None) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What gives a line's columns the names of fields."""
    columns = {} if section is None else section.columns
    if not columns:
        return lambda line: cast(dict[str, Any], line)

    def renamed(line: Mapping[str, Any]) -> dict[str, Any]:
        found = {field: line[column] for field, column in columns.items() if column in line}
        return {**{name: value for name, value in line.items() if name not in columns.values()}, **found}

    return renamed


def _reader(section: DatasetSection | None) -> Callable[[Line], Line]:
    rename = _columns(section)
    return lambda line: line._replace(value=rename(line.value))
