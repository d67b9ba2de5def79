"""Rows of what ``datasets`` opens, as lines: Parquet, Arrow, CSV and JSON files, saved datasets, Hub repositories."""

import hashlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError, first_line
from toolkit.strict_json import strict_json
from toolkit.training.corpus import digest
from toolkit.training.jsonl import BadLine, Line, LineSequence, bad_lines_error
from toolkit.training.progress import counted

if TYPE_CHECKING:
    from datasets import Dataset

    from toolkit.config.objective import DatasetSection

_BUILDERS = {
    ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json", ".txt": "text",
}  # fmt: skip
_LINES = {".jsonl": "json", ".ndjson": "json", ".gz": "json"}
"""Which are read as streams here, and indexed elsewhere (``toolkit.training.jsonl``)."""


class RowIndex(LineSequence):
    """Rows of a dataset at the given numbers; each is read when it is asked for."""

    def __init__(self, rows: "Dataset", name: str) -> None:
        self._rows, self._name = rows, name
        self._numbers = array("q")

    def add(self, number: int) -> None:
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, at: int) -> Line:
        number = self._numbers[at]
        return Line(number, without_nulls(self._rows[number - 1]), self._name)


class RowDataset:
    """The rows of a dataset, split into training and held out by a hash of each row, as ``JsonlDataset`` has lines.

    Args:
        section: what to open.
        field: of the recipe, for errors.
        val_set_size: expected share of the rows that is held out.
        check: raises ToolkitError for a row that is no example.
        on_bad_lines: ``error`` or ``skip``.

    Raises:
        ToolkitError: ``datasets`` cannot open it, or, with ``error``, bad rows.
    """

    def __init__(
        self,
        section: "DatasetSection",
        field: str,
        val_set_size: float,
        check: Callable[[dict[str, Any]], None],
        on_bad_lines: str = "error",
    ) -> None:
        self.name = f"{field} '{section.path}'"
        rows = open_rows(section, field)
        self.train, self.held_out = RowIndex(rows, section.path), RowIndex(rows, section.path)
        self.bad: list[BadLine] = []
        threshold, seen = int(val_set_size * 2**64), hashlib.sha256()
        indexed = counted(rows, getattr(rows, "num_rows", None), f"data: rows of {section.path} indexed")
        for number, row in enumerate(indexed, 1):
            value = without_nulls(row)
            text = text_of_row(value)
            seen.update(text.encode("utf-8", "surrogatepass"))
            try:
                check(value)
            except ToolkitError as error:
                self.bad.append(BadLine(number, str(error), section.path))
                continue
            side = self.held_out if digest(text) < threshold else self.train
            side.add(number)
        self.fingerprint = seen.hexdigest()
        if on_bad_lines == "error" and self.bad:
            raise bad_lines_error(self.name, self.bad)


def text_of_row(value: Any) -> str:
    """A row as text, of which its side of the split is a hash. The order of its columns says nothing."""
    return strict_json(value, sort_keys=True, default=str)


def open_rows(section: "DatasetSection", field: str, streaming: bool = False) -> Any:
    """The dataset of a section of a recipe, or a stream of it. Raises ToolkitError in one sentence where there is none.

    Args:
        section: what to open.
        field: of the recipe, for errors.
        streaming: return an ``IterableDataset``.
    """
    import datasets

    path = Path(section.path)
    try:
        if path.is_file():
            builder = (_BUILDERS | (_LINES if streaming else {})).get(path.suffix.lower())
            if builder is None:
                raise ToolkitError(
                    f"{field}.path must be a .jsonl, {', '.join(_BUILDERS)} file, a folder or a repository of the Hub, "
                    f"got '{section.path}'."
                )
            options = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
            found = datasets.load_dataset(
                builder, data_files=str(path), split=section.split, streaming=streaming, **options
            )
        elif path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
            if isinstance(found, datasets.DatasetDict):
                found = found[section.split]
            if streaming:
                found = found.to_iterable_dataset()
        else:
            found = datasets.load_dataset(
                section.path, section.name, data_files=section.data_files, split=section.split,
                revision=None if path.exists() else section.revision, streaming=streaming,
            )  # fmt: skip
    except ToolkitError:
        raise
    except Exception as error:  # of pyarrow, fsspec, huggingface_hub: there is no common class
        reason = f"no split {error}" if isinstance(error, KeyError) else first_line(error)
        raise ToolkitError(
            f"{field} must be a dataset that can be opened, got '{section.path}' with split '{section.split}' "
            f"({reason})."
        ) from None
    return found


def without_nulls(value: Any) -> Any:
    """The value without entries that are null: Arrow gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value
