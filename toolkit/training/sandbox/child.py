"""The process that runs untrusted code: it gives its own rights away, then runs the code and its tests.

A script of the standard library alone, started by ``toolkit.training.sandbox`` as ``python -I -S child.py SETTINGS`` in
an empty folder. SETTINGS is JSON: limits, paths to read, descriptors. What it could not give up is in the result.
"""

import builtins
import ctypes
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000  # user, network, IPC
_READ, _READ_FILE, _WRITE_FILE = 0b1101, 0b100, 0b10  # execute, read files, list folders
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x10000

# Numbers of system calls that are refused: other processes, sockets, limits, mounts, keys, attributes of files.
_X86_64: dict[str, Any] = {
    "nr_max": 0x40000000, "arch": 0xC000003E, "clone": 56, "refused": [
        29, 41, 42, 43, 44, 46, 49, 50, 57, 58, 59, 62, 64, 68, 90, 91, 92, 93, 94, 101, 109, 112, 129, 132, 135, 141,
        155, 160, 161, 163, 165, 166, 167, 168, 169, 175, 176, 179, 188, 189, 190, 197, 198, 199, 200, 234, 235, 246,
        248, 249, 250, 260, 261, 268, 272, 280, 288, 297, 298, 300, 302, 304, 308, 310, 311, 312, 313, 319, 321, 322,
        323, 424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 442, 452,
    ],
}  # fmt: skip
_AARCH64: dict[str, Any] = {
    "nr_max": 0xFFFFFFFF, "arch": 0xC00000B7, "clone": 220, "refused": [
        5, 6, 7, 14, 15, 16, 39, 40, 41, 51, 52, 53, 54, 55, 60, 88, 89, 92, 97, 104, 105, 106, 117, 129, 130, 131, 138,
        140, 142, 154, 157, 164, 186, 190, 194, 198, 200, 201, 202, 203, 206, 211, 217, 218, 219, 221, 224, 225, 240,
        241, 242, 261, 262, 265, 268, 270, 271, 272, 273, 279, 280, 281, 282, 424, 425, 426, 427, 428, 429, 430, 431,
        432, 433, 434, 438, 442, 452,
    ],
}  # fmt: skip
_TABLES: dict[str, dict[str, Any]] = {"x86_64": _X86_64, "aarch64": _AARCH64}


def limit(settings: dict[str, Any]) -> bool:
    """Bounds of the process, which it cannot raise again. Returns whether it can get no new privileges."""
    cpu = settings["cpu_seconds"]
    for which, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (value, value))
    _LIBC.prctl(1, 9, 0, 0, 0)  # killed when the parent ends
    return bool(_LIBC.prctl(38, 1, 0, 0, 0) == 0)  # no new privileges, as the two below ask for


def restrict_files(readable: Sequence[str], writable: str) -> bool:
    """Landlock: read Python and the system's libraries, write the own folder. Returns whether the kernel does it."""
    version = _LIBC.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 3:  # older ones cannot keep files from being truncated
        return False
    handled = (1 << 15) - 1 if version < 5 else (1 << 16) - 1
    attributes = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _LIBC.syscall(444, attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        return False
    for path, access in [*((one, _READ) for one in readable), (writable, handled), ("/dev/null", 0b110)]:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            access &= _READ_FILE | _WRITE_FILE | 1
        _LIBC.syscall(445, rules, 1, struct.pack("<Qi", access, beneath), 0)
        os.close(beneath)
    done = bool(_LIBC.syscall(446, rules, 0) == 0)
    os.close(rules)
    return done


def restrict_calls() -> bool:
    """Seccomp: system calls of the table fail. Returns whether the kernel does it."""
    table = _TABLES.get(platform.machine())
    if table is None:
        return False
    refused = sorted(table["refused"])

    def statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    error = 0x00050000
    program = [
        statement(load, 4), statement(equal, table["arch"], 1, 0), statement(give, 0x80000000),
        statement(load, 0), statement(at_least, table["nr_max"], 0, 1), statement(give, error | _EPERM),
        statement(equal, 435, 0, 1), statement(give, error | _ENOSYS),  # clone3, in whose place libc calls clone
        statement(equal, table["clone"], 0, 4), statement(load, 16), statement(bits, _CLONE_THREAD, 1, 0),
        statement(give, error | _EPERM), statement(give, 0x7FFF0000),
    ]  # fmt: skip
    for number in refused:
        program += [statement(equal, number, 0, 1), statement(give, error | _EPERM)]
    program.append(statement(give, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    return bool(_LIBC.prctl(22, 2, header, 0, 0) == 0)


def main() -> None:
    settings = json.loads(sys.argv[1])
    with open("program.json", encoding="utf-8") as file:
        program = json.load(file)
    os.unlink("program.json")
    missing = [] if limit(settings) else ["no new privileges"]
    _LIBC.unshare(_NEW_NAMESPACES)  # beside seccomp, where the kernel lets users make namespaces
    if not restrict_files(settings["readable"], settings["folder"]):
        missing.append("files (Landlock, Linux 6.2)")
    if not restrict_calls():
        missing.append("system calls (seccomp, on x86-64 and aarch64)")
    result = settings["result"]
    if missing and settings["strict"]:
        os.write(result, json.dumps({"missing": missing}).encode())
        os._exit(3)
    passed: list[bool] = []
    error: str | None = None
    space: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    try:
        exec(compile(program["code"], "completion.py", "exec"), space)
        for test in program["tests"]:
            try:
                exec(compile(test, "test.py", "exec"), space)
                passed.append(True)
            except Exception as raised:
                passed.append(False)
                error = error or f"{type(raised).__name__}: {raised}"
    except BaseException as raised:  # SystemExit too: tests that did not run have not passed
        passed, error = [], f"{type(raised).__name__}: {raised}"
    # The key is read behind the code: one that only prints or exits cannot say that it passed.
    key = os.read(settings["key"], 64).decode()
    os.write(result, json.dumps({"key": key, "passed": passed, "error": error and error[:500]}).encode())
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
