"""What an objective on given examples reads: a file, or several datasets one behind the other."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, cast

from toolkit.config.objective import DatasetSection, OfflineSection
from toolkit.errors import ToolkitError
from toolkit.training.corpus import digest
from toolkit.training.jsonl import BadLine, JsonlDataset, Line, LineSequence
from toolkit.training.rows import RowDataset

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
    """

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
        if evaluated:
            taken = [_first(source.train, section) for source, section in evaluated]
            self.held_out: Sequence[Line] = Joined(taken, [_reader(section) for _, section in evaluated])
        else:
            self.held_out = Joined([source.held_out for source in sources], reads)
        prints = [source.fingerprint for source in [*sources, *(source for source, _ in evaluated)]]
        self.fingerprint = prints[0] if len(prints) == 1 and sections[0] is None else repr((prints, sections))

    def firsts(self) -> Iterator[Line]:
        """The first line to train on of every source."""
        first = 0
        for count, _ in self.shares:
            if count:
                yield self.train[first]
            first += count


def open_lines(section: OfflineSection, check: Callable[[Mapping[str, Any]], None]) -> GivenLines | None:
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
