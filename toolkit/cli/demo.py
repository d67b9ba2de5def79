"""``toolkit demo``: train, generate, verify, export and serve, each as the command a user would type."""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = ["def main(argv=None):\n", "class Queue:\n    def __init__(self", "import os\nimport sys\n\n"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="run the whole story on this machine's own Python sources")
    parser.add_argument("--recipe", default="recipes/pretrain.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value overrides for the training recipe")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import shutil

    started = time.monotonic()
    out, exported = Path("runs/demo"), Path("runs/demo-export")
    shutil.rmtree(exported, ignore_errors=True)
    toolkit = [sys.executable, "-m", "toolkit.cli"]
    steps = [
        ["train", args.recipe, "run_name=demo", "overwrite=true", *args.overrides],
        ["generate", str(out), *PROMPTS, "--max-tokens", "64", "--temperature", "0.7", "--seed", "1"],
        ["verify", str(out), "--tokens", "2000"],
        ["export", str(out), str(exported)],
    ]
    for step in steps:
        _announce("toolkit", *step)
        status = subprocess.run([*toolkit, *step]).returncode
        if status != 0:
            print(f"toolkit {step[0]} ended with status {status}", file=sys.stderr)
            return status
    _announce("toolkit", "serve", str(exported))
    status = _serve_once(toolkit, exported)
    print(f"\ndemo finished in {time.monotonic() - started:.0f} s")
    return status


def _announce(*command: str) -> None:
    print(f"\n$ {shlex.join(command)}", flush=True)


def _serve_once(toolkit: list[str], model: Path) -> int:
    """Start a server, ask it once through the ``openai`` client, stop it; its exit status."""
    from openai import OpenAI

    command = [*toolkit, "serve", str(model), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
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
        answer = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=24, temperature=0)
        print(f"openai client: {answer.choices[0].text!r} ({answer.usage.completion_tokens} tokens)")  # type: ignore[union-attr]
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=30)
        print(f"server stopped with status {status}")
        return status
    finally:
        if server.poll() is None:
            server.kill()
