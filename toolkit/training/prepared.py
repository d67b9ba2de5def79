"""Tokenised lines on disk, by what they are made of: ``objective.dataset_prepared_path``."""

import dataclasses
import hashlib
import json
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, first_line
from toolkit.training.preparing import Outcome

REVISION = 2
"""Of what lines become; a change of it makes new files."""
COMMIT_EVERY = 1000
"""Lines that a crash loses at most; they are tokenised again."""


class PreparedLines:
    """Outcomes of lines, in one SQLite file for all runs with the same settings; processes may share it.

    Args:
        folder: of the files.
        settings: all that an outcome follows from beside its line and ``key``. Other settings are another file.
        make: an example of its fields.

    Attributes:
        found, made: lines that were in the file, and that were not.

    Raises:
        ToolkitError: the folder cannot be written to, or the file is none of SQLite.
    """

    def __init__(self, folder: str, settings: str, make: Callable[..., Any]) -> None:
        self._folder, self._make = folder, make
        self.found = self.made = 0
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(settings.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            self._file = sqlite3.connect(Path(folder) / f"{name}.sqlite", timeout=60.0)
            self._file.execute("CREATE TABLE IF NOT EXISTS lines (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def outcome(self, key: str, prepare: Callable[[], Outcome]) -> Outcome:
        """The outcome of a line, read, or prepared and kept. One with images is not kept: their files may change."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        try:
            row = self._file.execute("SELECT value FROM lines WHERE key = ?", (digest,)).fetchone()
            if row is not None:
                self.found += 1
                return self._read(row[0])
            outcome = prepare()
            if not any(getattr(one, "media", None) is not None for one in outcome.examples):
                self.made += 1
                self._file.execute("INSERT OR IGNORE INTO lines VALUES (?, ?)", (digest, _written(outcome)))
                if self.made % COMMIT_EVERY == 0:
                    self._file.commit()
            return outcome
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def commit(self) -> None:
        """Keep what was prepared, for other processes and runs."""
        try:
            self._file.commit()
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def close(self) -> None:
        """Keep what was prepared, and close the file."""
        self.commit()
        self._file.close()

    def _read(self, packed: bytes) -> Outcome:
        examples, counts, turn_ends = json.loads(zlib.decompress(packed))
        return Outcome([self._make(*one) for one in examples], Counter(counts), Counter(dict(turn_ends)))

    def _unusable(self, error: Exception) -> ToolkitError:
        return ToolkitError(
            f"objective.dataset_prepared_path must be a folder to write to, got '{self._folder}' ({first_line(error)})."
        )


def _written(outcome: Outcome) -> bytes:
    examples = [one if isinstance(one, tuple) else dataclasses.astuple(one) for one in outcome.examples]
    return zlib.compress(json.dumps([examples, outcome.counts, list(outcome.turn_ends.items())]).encode(), 1)


def settings_of(tokenizer: Any, values: dict[str, Any]) -> str:
    """What tokens follow from: the tokenizer with its template, the versions, and ``values`` of the recipe."""
    import transformers

    import toolkit

    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    versions = [REVISION, toolkit.__version__, transformers.__version__]
    specials = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    named = [type(tokenizer).__name__, vocabulary, specials, tokenizer.chat_template]
    return json.dumps([versions, named, values], sort_keys=True, default=str)
