"""Server processes that a benchmark measures: started, waited for, their CPU seconds, ended."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A process that answers at ``url``, and those that it has started."""

    def __init__(self, name: str, url: str, process: "subprocess.Popen[bytes]") -> None:
        self.name, self.url, self._process = name, url, process

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        return sum(_cpu_seconds(pid) for pid in [self._process.pid, *_children(self._process.pid)])

    def greedy(self, model: str, prompt: Any, tokens: int) -> str:
        """The text of a greedy completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=600).raise_for_status()
        return str(response.json()["choices"][0]["text"])


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has ended
    return (int(fields[11]) + int(fields[12])) / TICKS


def _children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, found) for one in (child, *_children(child))]


@contextmanager
def serving(
    name: str, command: Sequence[str], url: str, variables: Mapping[str, str], seconds: float = 600
) -> Iterator[Server]:
    """A server from when ``/health`` answers to the end of the block.

    Raises:
        RuntimeError: it ends or does not answer in time; the message has the end of its output.
    """
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **variables})
        try:
            end = time.monotonic() + seconds
            while not _is_up(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{name} does not answer at {url}:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield Server(name, url, process)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def toolkit_serve(folder: str, port: int, *options: str) -> list[str]:
    """The command of this project's server."""
    return [sys.executable, "-m", "toolkit.cli", "serve", folder, "--port", str(port), *options]
