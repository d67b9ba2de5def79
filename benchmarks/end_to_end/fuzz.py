"""A server process under random requests, rude clients and running streams at once; nothing may break.

``schemathesis`` makes valid and invalid requests from the OpenAPI document of the server and checks its responses
against that. Beside it run clients that misbehave (``rude_clients``), streams whose text is known, and a probe of
``/health``.

The gate: no 5xx, no traceback in the log, streams equal to those of a quiet server, every block free in the end, the
check that the engine has of its state, and an end by SIGTERM with status 0. With ``--max-p99`` the 99th percentile of
the probe too.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from benchmarks.common import print_table, write_json
from benchmarks.end_to_end.rude_clients import RudeClients

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)
LIMITS = "--max-model-len 64 --max-num-seqs 16 --max-num-batched-tokens 256 --block-size 8 --num-blocks 64"
STREAM = {"ignore_eos": True, "stream": True}
SERVE = """
import sys
from toolkit.cli import main
from toolkit.engine.engine import Engine
close = Engine.close
def checked(self):
    if not self.is_closed:
        self.check_integrity()
        print("integrity: ok", flush=True)
    close(self)
Engine.close = checked
sys.exit(main(sys.argv[1:]))
"""
"""``toolkit serve``, with the engine's check of its blocks and tables before it is closed."""


def make_model(folder: Path) -> None:
    from toolkit.testing.models import random_model, tiny_tokenizer

    random_model("llama", max_position_embeddings=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def start(model: Path) -> SimpleNamespace:
    """The server process, its URL and port, and the lists that its two streams fill."""
    options = f"--port 0 --grace 2 --timeout-keep-alive 5 {LIMITS}"
    command = [sys.executable, "-c", SERVE, "serve", str(model), *options.split()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, **pipes, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log: list[str] = []
    threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True).start()
    assert process.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
    if found is None:
        raise SystemExit(f"The server did not start: {''.join(log)}")
    out: list[str] = []
    threading.Thread(target=lambda: out.extend(process.stdout or ()), daemon=True).start()
    return SimpleNamespace(process=process, url=found[0], port=int(found[1]), log=log, out=out)


class Probe:
    """The process of ``health_probe``; ``seconds`` and ``failures`` once it was stopped."""

    def __init__(self, url: str) -> None:
        self.seconds: list[float] = []
        self.failures: list[str] = []
        command = [sys.executable, "-m", "benchmarks.end_to_end.health_probe", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stop(self) -> None:
        result = json.loads(self._process.communicate(timeout=120)[0])
        self.seconds, self.failures = sorted(result["seconds"]), result["failures"]

    def percentile(self, share: float) -> float:
        return self.seconds[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


class Streams:
    """Greedy and seeded streams whose text is known from before the storm."""

    REQUESTS = tuple(
        {"prompt": f"request {at}", "max_tokens": 8 + at, "seed": at, "temperature": at % 2, **STREAM}
        for at in range(8)
    )

    def __init__(self, url: str) -> None:
        self._url, self.wrong, self.count = url, [], 0  # type: ignore[var-annotated]
        self._stopped = threading.Event()
        with httpx.Client(base_url=url, timeout=60) as client:
            self._expected = [self._text(client, body) for body in self.REQUESTS]

    @staticmethod
    def _text(client: httpx.Client, body: dict[str, Any]) -> str:
        lines = [line for line in client.post("/v1/completions", json=body).text.split("\n\n") if line]
        if lines[-1] != "data: [DONE]":
            return f"error: {lines[-1]}"
        return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stopped.is_set():
                at = self.count % len(self.REQUESTS)
                body, expected = self.REQUESTS[at], self._expected[at]
                text = self._text(client, body)
                self.count += 1
                if text != expected:
                    self.wrong.append(f"stream of {body['prompt']!r}: {text!r}, alone {expected!r}")

    def stop(self) -> None:
        self._stopped.set()


def readings(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}


def statuses(read: dict[str, float]) -> dict[str, int]:
    """Responses by status."""
    counts: Counter[str] = Counter()
    for name, value in read.items():
        if found := re.match(r'toolkit:http_requests_total\{.*status="(\d+)"', name):
            counts[found[1]] += int(value)
    return dict(sorted(counts.items()))


def schemathesis(url: str, phases: str, examples: int, seed: int, timeout: float) -> tuple[int, str]:
    """Exit status and output of one run over the document that the server serves."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--suppress-health-check", "all"]
    options = f"--checks {CHECKS} --phases {phases} --max-examples {examples} --seed {seed} --workers 2"
    options += " --request-timeout 60 --warnings off --no-color --continue-on-failure"
    with tempfile.TemporaryDirectory() as folder:
        whole = [*command, *options.split()]
        done = subprocess.run(whole, cwd=folder, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def storm(server: SimpleNamespace, requests: int, seed: int) -> dict[str, Any]:
    """Everything at once until schemathesis has sent ``requests``; what was counted and what was wrong."""
    probe, streams, rude = Probe(server.url), Streams(server.url), RudeClients(server.port)
    threads = [threading.Thread(target=one.run, daemon=True) for one in (streams, rude)]
    for thread in threads:
        thread.start()
    wrong: list[str] = []
    errors: list[str] = []
    cases = runs = 0
    while cases < requests and not wrong and len(errors) < 3 and server.process.poll() is None:
        # Once through the edges of every field, which is 1,500 requests, where so many are asked for; then at random.
        phases, most = ("coverage,fuzzing", 200) if runs == 0 and requests >= 1500 else ("fuzzing", 500)
        examples = max(1, min(most, (requests - cases) // 3))
        status, output = schemathesis(server.url, phases, examples, seed + runs, timeout=3600)
        runs += 1
        cases += sum(map(int, re.findall(r"(\d+) generated", output)))
        if "= FAILURES =" in output or not cases:
            wrong.append(f"schemathesis ended with {status}: {output}")
        elif status:  # an exception within schemathesis: no check has failed
            errors.append(output[-3000:])
        print(f"{cases} of {requests} requests; responses {statuses(readings(server.url))}", flush=True)
    if len(errors) == 3:
        wrong += errors
    for one in (probe, streams, rude):
        one.stop()
    for thread in threads:
        thread.join(120)
        if thread.is_alive():
            wrong.append("a client waits for a response that does not come")
    wrong += probe.failures + streams.wrong + rude.wrong
    return {
        "wrong": wrong,
        "schemathesis_requests": cases,
        "schemathesis_errors": len(errors),
        "streams_compared": streams.count,
        "rude_clients": rude.counts,
        "health_probes": len(probe.seconds),
        "health_seconds": {f"p{share}": round(probe.percentile(share / 100), 4) for share in (50, 99)}
        | {"max": round(max(probe.seconds), 4)},
    }


def settle(server: SimpleNamespace, wrong: list[str]) -> dict[str, int]:
    """Responses by status, once nothing runs. Blocks that are still in use then are lost."""
    end = time.monotonic() + 30
    while (read := readings(server.url)) and time.monotonic() < end:
        if not read["toolkit:num_requests_running"] + read["toolkit:num_requests_waiting"]:
            break
        time.sleep(0.1)
    if read["toolkit:num_requests_running"] + read["toolkit:num_requests_waiting"]:
        wrong.append("requests run on without a client")
    if read["toolkit:kv_cache_usage_perc"]:
        wrong.append(f"blocks are lost: kv_cache_usage_perc is {read['toolkit:kv_cache_usage_perc']}")
    counts = statuses(read)
    wrong.extend(f"{counts[status]} responses of status {status}" for status in counts if status.startswith("5"))
    return counts


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The storm, then the gate; raises SystemExit with everything that was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        server, started = start(Path(folder)), time.perf_counter()
        try:
            result = storm(server, arguments.requests, arguments.seed)
            wrong = result.pop("wrong")
            counts = settle(server, wrong)
            seconds = time.perf_counter() - started
            server.process.send_signal(signal.SIGTERM)
            status = server.process.wait(timeout=60)
        finally:
            server.process.kill()
    time.sleep(0.2)  # the threads that read its output
    if status:
        wrong.append(f"the server ended with status {status}")
    if "integrity: ok\n" not in server.out:
        wrong.append("the engine's own check of its state has failed")
    if any("Traceback" in line for line in server.log):
        wrong.append("the log has a traceback: " + "".join(server.log)[-3000:])
    p99 = result["health_seconds"]["p99"]
    if arguments.max_p99 is not None and p99 > arguments.max_p99:
        wrong.append(f"/health: the 99th percentile is {p99} s, more than {arguments.max_p99} s")
    print(json.dumps(result), flush=True)
    if wrong:
        raise SystemExit("\n".join(dict.fromkeys(wrong)))
    responses = sum(counts.values())
    head = {"command": " ".join(["python -m benchmarks.fuzz", *sys.argv[1:]]), "limits": LIMITS}
    return {
        **head,
        "seconds": round(seconds),
        "responses": responses,
        "statuses": counts,
        **result,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="of schemathesis, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-p99", type=float, metavar="S", help="the gate's bound on /health (default: none)")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("schemathesis") is None:
        raise SystemExit("benchmarks.fuzz needs the package 'schemathesis'; install train-infer-toolkit[dev].")
    result = run(arguments)
    rows = [[name, json.dumps(value)] for name, value in result.items()]
    print_table("A server under fire", ["", ""], rows)
    write_json("fuzz", result)
