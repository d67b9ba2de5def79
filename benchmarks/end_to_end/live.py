"""Training clients beside each other and beside decoding: throughput, inter-token latency, memory.

``python -m benchmarks.live``: a 32 M Llama, clients of ranks 4, 8 and 32. All three at once against one with the same
number of tokens, and against one after the other where each request has 32 tokens; gaps between the tokens of a stream
while a client trains, with decode steps inside of training (``max_wait``) and without, over the number of streams;
resident memory. The gate compares losses and weights of the three with those of each alone, bit by bit.
"""

import argparse
import math
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import RESULTS, in_fresh_process, llama, peak_rss, print_table, turns, write_json
from toolkit.engine import AsyncEngine, Engine
from toolkit.live import Example, LiveConfig, LiveTraining

RANKS = {"a": 4, "b": 8, "c": 32}
STEP = {"learning_rate": 1e-3}
MICRO_BATCH = 256


def examples(seed: int, count: int, length: int) -> list[Example]:
    """Random sequences, with weights of 1."""
    g = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 8000, (length + 1,), generator=g) for _ in range(count)]
    return [Example(one[:-1], one[1:], {"weights": torch.ones(length)}) for one in tokens]


@contextmanager
def live(engine: AsyncEngine, ranks: dict[str, int], max_wait: float | None) -> Iterator[LiveTraining]:
    """Training with a client of each name."""
    with tempfile.TemporaryDirectory() as folder:
        config = LiveConfig(("base",), Path(folder), micro_batch_tokens=MICRO_BATCH, max_wait=max_wait)
        training = LiveTraining(engine, config)
        training.start()
        for name, rank in ranks.items():
            training.create(name, "base", {"rank": rank, "seed": 0}).result()
        yield training
        for name in ranks:
            training.unload(name).result()
        training.close()


class Client:
    """A training client's requests, in order."""

    def __init__(self, training: LiveTraining, name: str) -> None:
        self.training, self.name, self.number = training, name, 0

    def train(self, data: Sequence[Example]) -> list[Any]:
        """Futures of a forward and backward and of a step."""
        self.number += 2
        found = self.training.forward_backward(self.name, self.number - 1, data, "cross_entropy", {})
        return [found, self.training.optim_step(self.name, self.number, STEP)]


def numbers(engine: AsyncEngine, ranks: dict[str, int]) -> dict[str, Any]:
    """Losses and weights of clients that train at once."""
    with live(engine, ranks, 0.0) as training:
        clients = {name: Client(training, name) for name in ranks}
        seeds = {name: at for at, name in enumerate(RANKS)}
        pending = {
            name: [one.train(examples(seeds[name], 2, 24 + step)) for step in range(3)] for name, one in clients.items()
        }
        found: dict[str, Any] = {}
        for name, rounds in pending.items():
            found[f"{name}.losses"] = [part[0].result().loss for part in rounds]
            rounds[-1][1].result()
            weights = training.tenant(name).parameters
            found |= {f"{name}.{key}": one.detach().clone() for key, one in weights.items()}
    return found


def differing(engine: AsyncEngine) -> int:
    """Losses and weights that three clients at once have other than each alone."""
    together = numbers(engine, RANKS)
    alone: dict[str, Any] = {}
    for name, rank in RANKS.items():
        alone |= numbers(engine, {name: rank})
    return sum(
        not (torch.equal(one, alone[key]) if isinstance(one, torch.Tensor) else one == alone[key])
        for key, one in together.items()
    )


def throughput(engine: AsyncEngine, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way to train: three clients at once or one with as many tokens, and with short requests."""
    found: dict[str, list[float]] = {name: [] for name in ("one", "three", "short, in turn", "short, at once")}
    length, rounds = min(128, max(tokens // 3, 1)), 4
    count = max(tokens // (3 * length), 1)
    with live(engine, RANKS, 0.05) as training:
        clients = {name: Client(training, name) for name in RANKS}

        def finished(pending: Sequence[list[Any]]) -> None:
            for one in pending:
                for future in one:
                    future.result()

        def run(side: str) -> None:
            if side == "one":
                finished([clients["b"].train(examples(0, 3 * count, length))])
            elif side == "three":
                finished([one.train(examples(0, count, length)) for one in clients.values()])
            elif side == "short, at once":
                for _ in range(rounds):
                    finished([one.train(examples(0, 1, 32)) for one in clients.values()])
            else:
                for one in clients.values():
                    for _ in range(rounds):
                        finished([one.train(examples(0, 1, 32))])

        for side in found:
            run(side)
        for side in turns(found, repeats):
            start = time.perf_counter()
            run(side)
            found[side].append(time.perf_counter() - start)
    return found


def gaps(engine: AsyncEngine, streams: int, seconds: float, max_wait: float | None, training: bool) -> dict[str, float]:
    """The gaps between tokens of the first stream, and the tokens that a client trains meanwhile."""
    over, trained = threading.Event(), [0]
    data = examples(1, 4, 256)
    with live(engine, {"b": 8}, max_wait) as service:
        client = Client(service, "b")

        def train() -> None:
            while not over.is_set():
                for future in client.train(data):
                    future.result()
                trained[0] += sum(map(len, data))

        thread = threading.Thread(target=train)
        prompts = [[3 + (31 * row + at) % 997 for at in range(32)] for row in range(streams)]
        params = toolkit.SamplingParams(max_tokens=min(3900, 16_000 // max(streams, 1)), ignore_eos=True, seed=0)
        handle = engine.submit(prompts, params) if streams else None
        deltas = iter(handle) if handle is not None else None
        first = next(deltas).request_id if deltas is not None else None
        if training:
            thread.start()
        begun = last = time.perf_counter()
        found: list[float] = []
        while time.perf_counter() - begun < seconds:
            if deltas is None:
                time.sleep(0.01)
                continue
            if next(deltas).request_id == first:
                now = time.perf_counter()
                found.append(now - last)
                last = now
        elapsed = time.perf_counter() - begun
        over.set()
        if handle is not None and deltas is not None:
            handle.cancel()
            list(deltas)
        if training:
            thread.join()
            elapsed = time.perf_counter() - begun
    found.sort()
    p99 = found[math.ceil(0.99 * len(found)) - 1] if found else 0.0
    return {"tokens": len(found), "median_s": median(found) if found else 0.0, "p99_s": p99,
            "trained_tokens_per_s": trained[0] / elapsed}  # fmt: skip


def memory(names: Sequence[str], layers: int) -> dict[str, float]:
    """Bytes of this process: before the model, of its parts, and the most."""
    before = peak_rss()
    model = llama(num_hidden_layers=layers)
    engine = Engine(model, num_blocks=64, numerics="bitwise")
    pool = engine.pool.bytes
    base = sum(one.numel() * one.element_size() for one in model.parameters())
    chosen = {name: RANKS[name] for name in names}
    with AsyncEngine(engine) as served, live(served, chosen, 0.05) as training:
        clients = [Client(training, name) for name in chosen]
        for _ in range(2):
            for pending in [one.train(examples(0, MICRO_BATCH // 128, 128)) for one in clients]:
                for future in pending:
                    future.result()
        own = [one for name in chosen for one in training.tenant(name).parameters.values()]
        adapters = sum(one.numel() * one.element_size() for one in own)
    return {"before": before, "base": base, "pool": pool, "adapters": adapters, "peak": peak_rss()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--streams", type=int, nargs="*", default=[0, 1, 4, 16])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--max-wait-ms", type=float, default=50.0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory is not None:
        import json

        print(json.dumps(memory(arguments.memory, arguments.layers)))
        return
    model = llama(num_hidden_layers=arguments.layers)
    with AsyncEngine(Engine(model, num_blocks=1100, numerics="bitwise")) as engine:
        wrong = differing(engine)
        seconds = throughput(engine, arguments.tokens, arguments.repeats)
        bound = arguments.max_wait_ms / 1000
        sides = {"alone": (None, False), "whole batches": (None, True), "steps inside": (bound, True)}
        load = {
            streams: {side: gaps(engine, streams, arguments.seconds, *given) for side, given in sides.items()}
            for streams in arguments.streams
        }
    report(arguments, wrong, seconds, load)


def report(arguments: argparse.Namespace, wrong: int, seconds: Any, load: Any) -> None:
    """Print, write and plot; exit with 1 where a bit differs."""
    medians = {side: median(of) for side, of in seconds.items()}
    ratios = {
        "three clients at once / one client, same tokens": medians["one"] / medians["three"],
        "32 tokens each: at once / one after the other": medians["short, in turn"] / medians["short, at once"],
    }
    print_table(f"training clients; {wrong} losses and weights differ from alone", ["throughput", "times"],
                [[name, f"{ratio:.2f}x"] for name, ratio in ratios.items()])  # fmt: skip
    rows = [
        [streams, side, 1e3 * of["median_s"], 1e3 * of["p99_s"], of["trained_tokens_per_s"]]
        for streams, sides in load.items()
        for side, of in sides.items()
    ]
    header = ["streams", "training", "median ms", "p99 ms", "trained tok/s"]
    print_table("gaps between the tokens of a stream", header, rows)
    names = {"one": ["b"], "three": list(RANKS)}
    layers = ("--layers", str(arguments.layers))
    parts = {side: in_fresh_process("benchmarks.live", *layers, "--memory", *of) for side, of in names.items()}
    held = {side: of["base"] + 3 * of["adapters"] for side, of in parts.items()}  # with Adam's two means
    used = {side: of["peak"] - of["before"] - of["pool"] for side, of in parts.items()}
    bound = used["three"] / (held["three"] + used["one"] - held["one"])
    print(
        f"resident memory of three clients without the KV pool: {used['three'] / 2**20:.0f} MiB, {bound:.2f}x of base, "
        "adapters, optimizer state and one micro-batch"
    )
    if arguments.json:
        kept = {"settings": vars(arguments), "ratios": ratios, "seconds": seconds, "load": load, "memory": parts,
                "memory ratio": bound, "differ": wrong}  # fmt: skip
        print(f"written to {write_json(arguments.json, kept)} and {plot(arguments, load)}")
    if wrong:
        raise SystemExit(f"{wrong} losses or weights differ from those of a client alone.")


def plot(arguments: argparse.Namespace, load: Any) -> Path:
    """Inter-token latency and training throughput over the number of streams."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    latency, training = figure.subplots(1, 2)
    decoding = [streams for streams in load if streams]
    for side in ("alone", "whole batches", "steps inside"):
        latency.plot(decoding, [1e3 * load[one][side]["p99_s"] for one in decoding], "o-", label=side)
        if side != "alone":
            training.plot(list(load), [one[side]["trained_tokens_per_s"] for one in load.values()], "o-", label=side)
    latency.axhline(arguments.max_wait_ms, color="gray", linestyle=":", label="max_wait")
    latency.set(xlabel="streams", ylabel="p99 gap between tokens, ms", yscale="log")
    training.set(xlabel="streams", ylabel="trained tokens per second", ylim=(0, None))
    latency.legend()
    training.legend()
    path = RESULTS / f"{arguments.json}.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
