"""The command that resumes a run, as the user called the program."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_DROPPED = ("overwrite=", "resume_from_checkpoint=")


def resume_command(words: Sequence[str], started: bool) -> str:
    """A line for the shell that resumes what ``toolkit train`` with these ``words`` ran.

    Args:
        words: of the command line, after the program.
        started: whether the run has begun to write its folder; otherwise the line is the one that was called.
    """
    resumed = list(words)
    if started:
        kept = [word for word in words if not word.startswith(_DROPPED) and word != "--resume"]
        resumed = [kept[0], "--resume", *kept[1:]]  # in front, so that overrides can be added at the end
    return shlex.join([*_program(list(words)), *resumed])


def _program(words: list[str]) -> list[str]:
    """The words before those of the command line: ``toolkit``, ``python -m toolkit.cli`` or what launched it."""
    if sys.argv[1:] != words:  # called by another program
        return ["toolkit"]
    command = _launcher() or sys.orig_argv
    if command[len(command) - len(words) :] != words:
        command = sys.orig_argv
    program = command[: len(command) - len(words)]
    script = program[-1]
    if command is sys.orig_argv and "-m" not in program and os.access(script, os.X_OK):
        # A script with a shebang; the interpreter was added by the system.
        found = shutil.which(Path(script).name)
        return [Path(script).name if found is not None and os.path.samefile(found, script) else script]
    return program


def _launcher() -> list[str] | None:
    """The command line of torchrun, where that started this process; None otherwise or where it cannot be read."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        line = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return None
    words = [os.fsdecode(word) for word in line.split(b"\0")[:-1]]
    if len(words) > 1 and os.access(words[1], os.X_OK) and Path(words[1]).name in ("torchrun", "accelerate"):
        words = words[1:]
    return words
