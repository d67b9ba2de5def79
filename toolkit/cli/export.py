"""``toolkit export``: a model as another program opens it, run by that program and compared token by token."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGHUP)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("export", help="write a model that other engines open, and check it")
    parser.add_argument("model", help="checkpoint folder, adapters, GGUF file or training run")
    parser.add_argument("target", metavar="out", help="new folder to write")
    parser.add_argument("--to", default="hf", metavar="TARGET", help="what opens it; docs/export.md lists them (hf)")
    parser.add_argument("--quantise", metavar="FORMAT", help="format of the weights, such as q8_0 for gguf")
    parser.add_argument(
        "--imatrix", metavar="FILE", help="for gguf: importances of llama-imatrix, or a text to compute them from"
    )
    parser.add_argument("--dtype", default="float32", help="of the weights before that (float32)")
    parser.add_argument("--no-check", action="store_true", help="do not run the export and compare its tokens")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the export was written and, unless --no-check is given, generates the same greedy tokens.

    A format that rounds the weights may generate others: the number of equal prompts is printed, and the status is 0.
    """
    from toolkit.exporting.compared import export_and_compare

    with ended_by_signals():
        compared = export_and_compare(
            args.model, args.target, args.to, args.quantise, args.dtype, not args.no_check, args.imatrix
        )
    print(f"exported {args.model} to {compared.path}")
    if compared.left_out is not None:
        print(compared.left_out)
    if compared.consumer is not None:
        print(compared)
    elif not args.no_check:
        print(f"not checked: what opens {args.to} is not installed here")
    return 0 if compared.ok else 1


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside the block a signal that ends a process ends it through its exceptions, which leave nothing behind."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
