"""Runs one step of the set-up: what it does, progress while it runs, how long it took.

``python tools/step.py --log FILE LABEL -- COMMAND ...`` keeps the command's output in the log and shows the log's end
only when the command fails. Lines that begin with ``toolkit:`` are shown at once. It needs nothing but Python, since it
runs before anything is installed.
"""

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

TAIL = 40  # lines of the log that a failure shows
EVERY = 15.0  # seconds between two lines of progress where the output is no terminal


class Progress:
    """The running step on the terminal: one line that is written anew every second, or a line now and then."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.start = time.monotonic()
        self.last = ""
        self.terminal = sys.stdout.isatty()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        print(f"== {label}", end="" if self.terminal else "\n", flush=True)
        self._thread.start()

    def show(self, line: str) -> None:
        """A line that stays."""
        with self._lock:
            print(f"{self._clear()}   {line}", flush=True)

    def finish(self, outcome: str) -> None:
        self._done.set()
        self._thread.join()
        seconds = time.monotonic() - self.start
        print(f"{self._clear()}== {self.label}: {outcome} {seconds:.0f} s", flush=True)

    def _tick(self) -> None:
        while not self._done.wait(1.0 if self.terminal else EVERY):
            with self._lock:
                seconds = time.monotonic() - self.start
                if self.terminal:
                    print(f"{self._clear()}== {self.label} {seconds:.0f} s  {self.last[:60]}", end="", flush=True)
                else:
                    print(f"   {seconds:.0f} s  {self.last[:90]}", flush=True)

    def _clear(self) -> str:
        return "\r\x1b[K" if self.terminal else ""


def run(label: str, command: list[str], log: TextIO, optional: bool) -> int:
    """The command's exit status; 0 for an optional one that failed."""
    progress = Progress(label)
    log.write(f"$ {' '.join(command)}\n")
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        progress.finish("failed after")
        print(error, file=sys.stderr)
        return 1
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        text = line.strip()
        if not text or text.startswith("WARNING: Location "):
            continue
        lines.append(text)
        if text.startswith("toolkit:"):
            progress.show(text)
        else:
            progress.last = text
    log.flush()
    status = process.wait()
    if status == 0:
        progress.finish("done in")
        return 0
    progress.finish("not possible here, after" if optional else "failed after")
    if optional:
        return 0
    print(f"The last lines of {log.name}:", *lines[-TAIL:], sep="\n", file=sys.stderr)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("label")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--optional", action="store_true", help="a failure is one line, and the exit status is 0")
    if "--" not in sys.argv:
        parser.error("the command must come after --")
    at = sys.argv.index("--")
    arguments, command = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("a") as log:
        return run(arguments.label, command, log, arguments.optional)


if __name__ == "__main__":
    sys.exit(main())
