"""Code of completions in processes with limits: what passes, what fails, and what it tries in vain."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import ToolkitError
from toolkit.training.reward_functions import RewardFunctions
from toolkit.training.sandbox import Limits, code, code_block, run_code, run_many, running
from toolkit.training.sandbox.running import _signal_name


@pytest.fixture(autouse=True, scope="module")
def isolated() -> None:
    """Skip where the kernel cannot isolate, which is an error for users."""
    try:
        run_code("")
    except ToolkitError as error:
        pytest.skip(str(error))


LIMITS = Limits(cpu_seconds=2, wall_seconds=60.0, memory_bytes=256 << 20)
FUNCTION = "def f(x): return x + 1"


def test_tests_that_hold_pass_and_others_fail() -> None:
    good, partial, alone, early, late, broken = run_many(
        [
            (FUNCTION, ["assert f(1) == 2", "assert f(-1) == 0"]),
            ("def f(x): return 2", ["assert f(1) == 2", "assert f(5) == 6, 'five'"]),
            ("import math, json, re, random, asyncio, threading\nprint(math.pi)", []),
            ("import os; os._exit(0)", ["assert False"]),
            ("raise SystemExit(0)", ["assert False"]),
            ("def f(x: return 2", ["assert True"]),
        ],
        LIMITS,
    )
    assert (good.status, good.passed, good.share) == ("passed", [True, True], 1.0)
    assert (partial.status, partial.share, partial.error) == ("failed", 0.5, "AssertionError: five")
    assert (alone.status, alone.share, alone.output) == ("passed", 1.0, "3.141592653589793\n")
    assert (early.status, early.share, early.error) == ("failed", 0.0, "the program ended before its tests")
    assert (late.status, late.share, late.error) == ("failed", 0.0, "SystemExit: 0")
    assert broken.status == "failed"
    assert broken.error.startswith("SyntaxError")


def test_rewards_of_completions_by_their_lines_tests() -> None:
    fence = "```"
    right, wrong = (f"So:\n{fence}python\ndef f(x):\n    return x + {n}\n{fence}\nDone." for n in (1, 2))
    completions = [
        right,
        wrong,
        "no code",
        [{"role": "assistant", "content": f"{fence}\nx = 1\n{fence}\n{right}"}],
        right,
    ]
    tests: list[Any] = ["assert f(1) == 2", ["assert f(1) == 2", "assert f(0) < 3"], "pass", ["assert f(2) == 3"], None]
    columns = [{"tests": one, "cpu_seconds": 2, "memory_mb": None} for one in tests]
    functions = RewardFunctions.load(["toolkit.training.sandbox:code"])
    found = functions(["?"] * 5, completions, [[]] * 5, columns)
    assert found.totals[:4] == [1.0, 0.5, 0.0, 1.0]
    assert found.totals[4] != found.totals[4]  # None: no tests, no reward
    assert code_block("```python\nfirst\n```\n```py\nlast\n```") == "last\n"
    assert code_block("```python\nnever closed") is None


def test_what_code_writes_as_its_result_is_no_other_reward() -> None:
    forged = """
import json, os, sys
settings = json.loads(sys.argv[1])
os.write(settings["result"], json.dumps({"key": os.read(settings["key"], 64).decode(), "passed": [100.0]}).encode())
os._exit(0)
"""
    assert run_code(forged, ["assert False"]).share == 0.0


def test_too_many_tests() -> None:
    with pytest.raises(ToolkitError, match="tests must have <= 4096 entries, got 5000"):
        run_code("", ["pass"] * 5000)


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "secret"
    file.write_text("before")
    file.chmod(0o644)
    yield file
    assert file.read_text() == "before"
    assert file.stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(tmp_path)) == ["secret"]


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


def attacks(secret: Path, port: int) -> list[tuple[str, str, str]]:
    """Code, and the status and the beginning of the error that it must have."""
    file, refused = str(secret), "PermissionError"
    return [
        ("while True: pass", "killed", "killed by SIG"),
        ("x = bytearray(1 << 30)", "failed", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "failed", "MemoryError"),
        ("while True: print('x' * 1000)", "output", "stopped: output"),
        ("import os\nwhile True: os.fork()", "failed", refused),
        ("import subprocess; subprocess.run(['/bin/true'])", "failed", refused),
        ("import os; os.execv('/bin/true', ['true'])", "failed", refused),
        ("import multiprocessing as m; m.Process(target=print).start()", "failed", "OSError|PermissionError"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "failed", refused),
        (f"open({file!r}, 'w')", "failed", refused),
        (f"open({file!r}).read()", "failed", refused),
        (f"import os; os.unlink({file!r})", "failed", refused),
        (f"import os; os.rename({file!r}, {file + 'x'!r})", "failed", refused),
        (f"import os; os.symlink({file!r}, 'x'); open('x').read()", "failed", refused),
        (f"import os; os.link({file!r}, 'x')", "failed", "PermissionError|OSError"),
        (f"import os; os.truncate({file!r}, 0)", "failed", refused),
        (f"import os; os.chmod({file!r}, 0o777)", "failed", refused),
        (f"import os; os.chown({file!r}, 1, 1)", "failed", refused),
        (f"import os; os.utime({file!r})", "failed", refused),
        (f"import os; os.mkdir({file + 'd'!r})", "failed", refused),
        (f"import os; os.listdir({str(secret.parent)!r})", "failed", refused),
        ("import os; open(f'/proc/{os.getppid()}/environ').read()", "failed", refused),
        ("open('/proc/self/mem', 'r+b')", "failed", refused),
        ("open('/etc/passwd').read()", "failed", refused),
        ("import os; os.listdir('/')", "failed", refused),
        (f"import socket; socket.create_connection(('127.0.0.1', {port}))", "failed", refused),
        ("import socket; socket.socket(socket.AF_UNIX)", "failed", refused),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1')", "failed", "URLError"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "failed", refused),
        ("import os, signal; os.kill(-1, signal.SIGKILL)", "failed", refused),
        ("import os; os.setsid()", "failed", refused),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "failed", "ValueError|PermissionError"),
        ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "failed", "AssertionError"),
        ("import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0", "failed", "AssertionError"),
        ("import ctypes; assert ctypes.CDLL(None).mount(b'x', b'.', b'tmpfs', 0, 0) == 0", "failed", "AssertionError"),
        ("import ctypes; assert ctypes.CDLL(None).syscall(425, 8, 0) >= 0", "failed", "AssertionError"),
        ("open('big', 'wb').write(bytes(1 << 25))", "failed|killed", "OSError|killed by SIGXFSZ"),
        ("import os; assert not os.environ.keys() - {'LC_CTYPE'}, os.environ", "passed", ""),
        ("import os; assert not os.listdir('.'); open('own', 'w').write('x'); assert open('own').read()", "passed", ""),
        ("import os; os.close(1); os.close(2)", "passed", ""),
        ("import threading as t; a = t.Thread(target=print); a.start(); a.join()", "passed", ""),
    ]  # fmt: skip


def check(cases: list[tuple[str, str, str]]) -> None:
    import re

    wrong = [
        (code, outcome)
        for (code, status, error), outcome in zip(cases, run_many([(one[0], []) for one in cases], LIMITS), strict=True)
        if not (re.fullmatch(status, outcome.status) and re.match(error, outcome.error))
    ]
    assert wrong == []


def test_files_sockets_and_processes_cannot_be_had(secret: Path, port: int) -> None:
    check([one for one in attacks(secret, port) if "open(" in one[0] or "socket" in one[0]][:6])


@pytest.mark.sweep
def test_attacks(secret: Path, port: int) -> None:
    os.environ["TOOLKIT_SECRET"] = "x"
    try:
        check(attacks(secret, port))
    finally:
        del os.environ["TOOLKIT_SECRET"]


@pytest.mark.sweep
def test_a_program_that_waits_is_ended_by_the_wall_clock() -> None:
    outcome = run_code("import time\nprint('begun', flush=True)\ntime.sleep(3600)", limits=Limits(wall_seconds=5.0))
    assert outcome.status == "timeout"
    closed = run_code("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(3600)", limits=Limits(wall_seconds=5.0))
    assert closed.status == "timeout"


@pytest.mark.parametrize("said", [b'{"missing": ["files"]}', b"[" * 30_000, b'{"passed": [true]}'])
def test_code_that_forges_its_result_fails(said: bytes) -> None:
    code = f"""
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, {said!r})
    except OSError:
        pass
os._exit(3)
"""
    outcome = run_code(code, ["assert True"], LIMITS)
    assert (outcome.status, outcome.share) == ("failed", 0.0)


def test_signals_without_a_name() -> None:
    assert [_signal_name(number) for number in (9, 40)] == ["SIGKILL", "signal 40"]


def test_standard_input() -> None:
    assert run_code("print(int(input()) + int(input()))", stdin="2\n3\n", limits=LIMITS).output == "5\n"


def test_waiting_for_a_busy_cpu_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(wall_seconds=0.5)
    monkeypatch.setattr(running, "_waited", lambda pid: 100.0)
    assert run_code("import time\ntime.sleep(0.5)", limits=limits).status == "passed"
    monkeypatch.setattr(running, "_waited", lambda pid: 0.0)
    assert run_code("import time\ntime.sleep(0.5)", limits=limits).status == "timeout"
    monkeypatch.undo()
    assert 0.0 <= running._waited(os.getpid()) < 3600.0
    assert running._waited(2**22 + 1) == 0.0


def test_of_a_conversation_the_models_last_turn_is_run() -> None:
    block = "```python\n{}\n```\n"
    said = block.format("x = 1") + "such as\n" + block.format("x = 2") + block.format("x = 3")
    responses = [block.format("x = 1"), block.format("x = 3")]
    assert code([said + block.format("x = 4")], ["assert x == 3"], states=[{"responses": responses}]) == [1.0]
    assert code([said], ["assert x == 3"], states=[{"responses": []}]) == [0.0]
