"""``toolkit export``: a model as another program opens it, run by that program and compared token by token."""

import argparse
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPTS = 8
TOKENS = 64
STOPS = (signal.SIGTERM, signal.SIGHUP)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("export", help="write a model that other engines open, and check it")
    parser.add_argument("model", help="checkpoint folder, adapters, GGUF file or training run")
    parser.add_argument("target", metavar="out", help="new folder to write")
    parser.add_argument("--to", default="hf", metavar="TARGET", help="what opens it; docs/export.md lists them (hf)")
    parser.add_argument("--quantise", metavar="FORMAT", help="format of the weights, such as q8_0 for gguf")
    parser.add_argument("--dtype", default="float32", help="of the weights before that (float32)")
    parser.add_argument("--no-check", action="store_true", help="do not run the export and compare its tokens")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the export was written and, unless --no-check is given, generates the same greedy tokens.

    A format that rounds the weights may generate others: the number of equal prompts is printed, and the status is 0.
    """
    import random

    from toolkit.cli.verify import real_prompts
    from toolkit.engine import Engine, SamplingParams
    from toolkit.exporting import MANIFEST, TARGETS, export, is_lossless
    from toolkit.loading import load_model, load_with_adapters
    from toolkit.patching.adapters import vocabulary_size
    from toolkit.quantised import dequantise

    target = TARGETS.find("--to", args.to)()
    with ended_by_signals():
        model, tokenizer = load_model(args.model, args.dtype)
        dequantise(model)  # of a checkpoint in another library's layout
        with Engine(model, tokenizer) as engine:
            prompts = real_prompts(tokenizer, vocabulary_size(model), random.Random(0))[:PROMPTS]
            path = export(
                load_with_adapters(args.model, args.dtype) if target.holds_adapters else model,
                args.target,
                args.to,
                tokenizer,
                args.quantise,
                () if args.no_check else prompts,
                TOKENS,
            )
            print(f"exported {args.model} to {path}")
            if args.no_check:
                return 0
            proof = json.loads((Path(path) / MANIFEST).read_text())["proof"]
            if proof is None:
                print(f"not checked: what opens {args.to} is not installed here")
                return 0
            params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
            ours = [list(completion.token_ids) for completion in engine.generate(prompts, params)]
    same = sum(a == b for a, b in zip(ours, proof["outputs"]))
    print(f"{proof['consumer']} on the export: {same} of {PROMPTS} prompts give the same {TOKENS} greedy tokens")
    return 0 if same == PROMPTS or not is_lossless(target, args.quantise) or args.dtype != "float32" else 1


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
