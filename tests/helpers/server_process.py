"""A real server process, as a user starts it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready.

    Args:
        process: of ``toolkit serve``.
        line: that it printed when it was ready.
        errors: lines of its standard error so far.
        reader: that reads them.
    """

    process: subprocess.Popen[str]
    line: str
    errors: list[str]
    reader: threading.Thread

    @property
    def url(self) -> str:
        """Where it serves; the path of a socket after ``unix:``."""
        return self.line.rsplit(" ", 1)[1].strip()

    def errors_read(self, seconds: float = 200.0) -> None:
        """Wait until all who write to its standard error have ended, and ``errors`` has their lines."""
        self.reader.join(seconds)
        assert not self.reader.is_alive()


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[ServerProcess]:
    """``toolkit serve FOLDER OPTIONS`` until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit.cli", "serve", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    errors: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    reader = threading.Thread(target=lambda lines=process.stderr: errors.extend(lines), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        assert line, errors
        yield ServerProcess(process, line, errors, reader)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
