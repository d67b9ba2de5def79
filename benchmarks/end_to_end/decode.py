"""Decode steps of the engine by both executors of captured graphs, and what a step costs the host.

``python -m benchmarks.decode``: the executors take turns of a few steps, after a pause in which the other's threads
fall asleep (OpenMP's spin for some milliseconds after each op, on the cores that the next step wants). A step cannot
take less than reading its weights once, at the rate that a sum over as many bytes has in the same run; from some batch
on arithmetic takes longer than that. ``thin`` has 36 layers so narrow that at batch 1 its step is what the host costs;
its ``host`` is CPU time of a step whose captured graph computes nothing. ``weights`` is CPU time of the look at the
weights that each step begins with, after a step that read them all.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import interleaved, llama, print_table, turns, write_json
from benchmarks.end_to_end.narrow import smollm2
from toolkit.engine.step.executors import EXECUTORS, straight_line

STEPS = 3  # timed, of each turn
SIDES = {"native": EXECUTORS, "straight line": (straight_line,)}


def thin() -> Any:
    """36 layers of Qwen3 whose matrices hold a few numbers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config: Any = Qwen3Config(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=36, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama().eval(),
    "smollm2": lambda: smollm2(torch.float32, 30),
    "thin": thin,
}


def steps(model: Any, batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of decode steps of ``batch`` sequences, by executor, in turns."""
    engines = {}
    for side, executors in SIDES.items():
        engine = engines[side] = new_engine(model, batch, repeats)
        engine.backend.graphs.executors = executors  # type: ignore[attr-defined]
    return timed_steps(engines, batch, repeats)


def new_engine(model: Any, batch: int, repeats: int) -> toolkit.Engine:
    """An engine with room for what ``timed_steps`` runs."""
    return toolkit.Engine(model, max_num_seqs=batch, max_model_len=256 + 8 * repeats)


def timed_steps(engines: Mapping[str, toolkit.Engine], batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of decode steps of ``batch`` sequences in each engine, in turns; the engines are closed."""
    for engine in engines.values():
        params = toolkit.SamplingParams(max_tokens=128 + 8 * repeats, temperature=0.0, ignore_eos=True)
        for at in range(batch):
            engine.submit([3 + at % 7] * 64, params)
        for _ in range(4 + batch * 64 // 2048):  # the prompts, and the capture
            engine.step()
    seconds: dict[str, list[float]] = {side: [] for side in engines}
    for side in turns(engines, repeats):
        time.sleep(0.05)
        engines[side].step()
        for _ in range(STEPS):
            begun = time.perf_counter()
            engines[side].step()
            seconds[side].append(time.perf_counter() - begun)
    for engine in engines.values():
        engine.close()
    return seconds


def stub(graphs: Any) -> None:
    """Let replays compute nothing: logits are zeros, and so is what is sampled."""
    logits: dict[int, torch.Tensor] = {}

    def forward(context: Any, sampling: Any = None) -> torch.Tensor:
        rows = len(context.batch.tokens)
        return logits.setdefault(rows, torch.zeros(rows, 512))

    graphs.forward = forward


def thread_seconds(function: Callable[[], Any]) -> float:
    """CPU time of this thread: other processes take turns on the cores."""
    begun = time.thread_time()
    function()
    return time.thread_time() - begun


def host_seconds(batch: int, repeats: int = 100) -> list[float]:
    """CPU time of decode steps of ``thin`` without their kernels."""
    with toolkit.Engine(thin(), max_num_seqs=batch, max_model_len=512) as engine:
        params = toolkit.SamplingParams(max_tokens=450, temperature=0.8, ignore_eos=True)
        for at in range(batch):
            engine.submit([5, 6, 7 + at], params)
        for _ in range(4):
            engine.step()
        stub(engine.backend.graphs)  # type: ignore[attr-defined]
        seconds = [thread_seconds(engine.step) for _ in range(repeats)]
        assert engine.stats()["generation_tokens"] >= repeats * batch
        return seconds


def look_seconds(model: Any, repeats: int) -> list[float]:
    """CPU time of the look at a model's weights, after decode steps of one sequence."""
    with toolkit.Engine(model, max_num_seqs=1, max_model_len=256) as engine:
        engine.submit([3] * 16, toolkit.SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))
        engine.step()
        found = []
        for _ in range(repeats):
            engine.step()
            found.append(thread_seconds(engine.see_weights))
        return found


def read_rate(size: int) -> float:
    """Bytes per second of a sum over ``size`` bytes of float32, the best of five."""
    values = torch.ones(size // 4)
    return size / min(interleaved({"sum": partial(torch.sum, values)}, 5)["sum"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, found = [], []
    for name in arguments.models:
        torch.manual_seed(0)
        model = MODELS[name]()
        toolkit.patch(model, numerics="bitwise")
        size = sum(parameter.nbytes for parameter in model.parameters())
        limit = size / read_rate(max(size, 1 << 28))
        look = median(look_seconds(model, 4 * arguments.repeats))
        for batch in arguments.batch:
            seconds = steps(model, batch, arguments.repeats)
            host = min(host_seconds(batch)) if name == "thin" else None
            medians = {side: median(values) for side, values in seconds.items()}
            ratio = medians["straight line"] / medians["native"]
            ms = [1e3 * one for one in (*(medians[side] for side in SIDES), limit, look)]
            rows.append([name, batch, *ms[:2], f"{ratio:.2f}x", *ms[2:], "" if host is None else f"{1e3 * host:.2f}"])
            found.append(
                {"model": name, "batch": batch, "seconds": seconds, "ratio": ratio, "read_s": limit, "look_s": look}
                | ({} if host is None else {"host_s": host})
            )
    header = ["model", "batch", "native ms", "Python ms", "ratio", "reading ms", "weights ms", "host ms"]
    print_table("a decode step, fp32", header, rows)
    if arguments.json:
        print(f"written to {write_json(arguments.json, {'threads': arguments.threads, 'steps': found})}")


if __name__ == "__main__":
    main()
