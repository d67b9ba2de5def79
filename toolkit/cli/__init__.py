"""Command ``toolkit``: a module a subcommand, with ``add_parser(subparsers)`` and ``run(args) -> int``."""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from toolkit.cli.quiet import silence_libraries
from toolkit.errors import ToolkitError
from toolkit.machine import share_cpus

COMMANDS = (
    "init",
    "schema",
    "train",
    "watch",
    "generate",
    "verify",
    "export",
    "serve",
    "batch",
    "patches",
    "coverage",
    "demo",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit status. Bad input is one line on standard error and status 2."""
    silence_libraries()
    if "torch" not in sys.modules:  # OpenMP reads its settings when it is loaded
        share_cpus()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows its code
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    # Only the command at hand is imported; help and mistakes need them all.
    names = words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS
    modules = {name: importlib.import_module(f"toolkit.cli.{name}") for name in names}
    parser = argparse.ArgumentParser(
        prog="toolkit",
        description="Patch a Hugging Face model once; train it, roll it out, export it and serve it.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in modules.values():
        module.add_parser(subparsers)
    args = parser.parse_args(words)
    args.words = words
    try:
        status: int = modules[args.command].run(args)
        return status
    except ToolkitError as error:
        print(f"toolkit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The other end of the pipe is closed; without this the interpreter's last flush would fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
