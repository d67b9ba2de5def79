"""Runs code in a child process and watches it."""

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import ToolkitError

_CHILD = Path(__file__).with_name("child.py")
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom")
MOST_TESTS = 4096
_MOST_WAITING = 9
"""Of ``wall_seconds``, that a process may wait for a CPU without being ended."""
Status = Literal["passed", "failed", "timeout", "killed", "output"]


@dataclass(frozen=True)
class Limits:
    """Bounds of a process.

    Args:
        cpu_seconds: of CPU time, a whole number.
        wall_seconds: from the start of the process, without those that it waited for a busy CPU (as Linux counts them);
            those count from the tenfold on.
        memory_bytes: of address space, of which Python takes some 30 MB.
        file_bytes: of a file that it writes.
        output_bytes: of standard output and error together.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Args:
        status: "passed" (the code ran and all tests passed), "failed", "timeout" (wall time), "killed" (by a signal:
            CPU time, or the kernel), or "output" (too much of it).
        passed: for each test whether it passed; empty where the code did not run to its end.
        error: of the code or the first test that failed.
        output: what it printed, up to the bound.
    """

    status: Status
    passed: list[bool]
    error: str
    output: str

    @property
    def share(self) -> float:
        """Of the tests that passed; without tests 1 where the code ran to its end."""
        if self.passed:
            return sum(self.passed) / len(self.passed)
        return float(self.status == "passed")


def run_code(
    code: str, tests: Sequence[str] = (), limits: Limits | None = None, *, stdin: str = "", strict: bool = True
) -> Outcome:
    """Run a program, then each test in its namespace; a test fails that raises (``assert``).

    Args:
        code: Python, with the standard library alone.
        tests: Python.
        limits: of the process; None for the default ones.
        stdin: what it reads from standard input.
        strict: raise where the kernel cannot restrict files and system calls; False runs with the limits alone.

    Raises:
        ToolkitError: the isolation is not to be had here, or there are too many tests.
    """
    if strict:
        check_isolation()
    return _run(code, tests, limits or Limits(), stdin, strict)


@cache
def check_isolation() -> None:
    """Run an empty program, once per process. Only of that one is it believed what the kernel does not restrict.

    Raises:
        ToolkitError: the isolation is not to be had here.
    """
    found = _run("", (), Limits(wall_seconds=120.0), "", True)
    if found.status != "passed":
        raise ToolkitError(f"the sandbox needs {found.error}, got another.")


def _run(code: str, tests: Sequence[str], limits: Limits, stdin: str, strict: bool) -> Outcome:
    if len(tests) > MOST_TESTS:
        raise ToolkitError(f"tests must have <= {MOST_TESTS} entries, got {len(tests)}.")
    if not sys.platform.startswith("linux"):
        raise ToolkitError(f"the sandbox needs Linux, got {sys.platform}.")
    with tempfile.TemporaryDirectory(prefix="toolkit-sandbox-") as folder:
        program, given = Path(folder, "program.json"), Path(folder, "stdin")
        program.write_text(json.dumps({"code": code, "tests": list(tests)}), encoding="utf-8")
        given.write_bytes(stdin.encode("utf-8", "replace"))
        with given.open("rb") as standard_input:
            given.unlink()
            return _watched(folder, standard_input, limits, len(tests), strict)


def run_many(
    jobs: Sequence[tuple[str, Sequence[str]]], limits: Limits | None = None, workers: int = 0
) -> list[Outcome]:
    """``run_code`` of (code, tests) pairs, ``workers`` at a time; 0 for as many as there are CPUs."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: run_code(job[0], job[1], limits), jobs))


def _watched(folder: str, standard_input: Any, limits: Limits, tests: int, strict: bool) -> Outcome:
    key = secrets.token_hex(16)
    key_out, key_in = os.pipe()
    result_out, result_in = os.pipe()
    os.write(key_in, key.encode())
    os.close(key_in)
    settings = {
        **asdict(limits), "readable": sorted({sys.prefix, sys.base_prefix, *_SYSTEM}), "folder": folder,
        "key": key_out, "result": result_in, "strict": strict,
    }  # fmt: skip
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD), json.dumps(settings)],
            cwd=folder, env={}, stdin=standard_input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=(key_out, result_in), start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(key_out)
        os.close(result_in)
    try:
        output, ended = _read(process, limits)
    finally:
        _kill(process)
        said = _said(result_out)
        os.close(result_out)
    text = output.decode("utf-8", "replace")
    if ended is not None:
        return Outcome(ended, [], f"stopped: {ended}", text)
    if process.returncode < 0:
        return Outcome("killed", [], f"killed by {_signal_name(-process.returncode)}", text)
    missing = said.get("missing")
    if isinstance(missing, list):
        return Outcome("failed", [], f"a kernel that restricts {' and '.join(map(str, missing))}", text)
    passed = said.get("passed")
    # Code that found the descriptor may have written it, and a share must be from 0 to 1.
    if said.get("key") != key or not isinstance(passed, list) or not all(isinstance(one, bool) for one in passed):
        return Outcome("failed", [], "the program ended before its tests", text)
    complete = said.get("error") is None and len(passed) == tests and all(passed)
    return Outcome("passed" if complete else "failed", passed, said.get("error") or "", text)


def _read(process: "subprocess.Popen[bytes]", limits: Limits) -> tuple[bytes, Status | None]:
    """What the process prints, until it ends; and why it is to be ended, or None."""
    begun, output = time.monotonic(), bytearray()

    def left() -> float:
        passed = time.monotonic() - begun
        return limits.wall_seconds - passed + min(_waited(process.pid), _MOST_WAITING * limits.wall_seconds)

    assert process.stdout is not None
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (seconds := left()) > 0:
            if not selector.select(seconds):
                continue
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                break
            output += part[: limits.output_bytes + 1 - len(output)]
            if len(output) > limits.output_bytes:
                return bytes(output[: limits.output_bytes]), "output"
    while process.poll() is None:  # it may have closed its output and run on
        seconds = left()
        if seconds <= 0:
            return bytes(output), "timeout"
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    return bytes(output), None


def _waited(pid: int) -> float:
    """Seconds that a process has waited for a CPU that others used; 0 where the kernel does not count them."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process, and those of its session where it could start any."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _signal_name(number: int) -> str:
    """Real-time signals have no names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _said(descriptor: int) -> dict[str, Any]:
    """What the process wrote to its result; nothing where that is no JSON object."""
    try:
        found = json.loads(os.read(descriptor, 1 << 16) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
