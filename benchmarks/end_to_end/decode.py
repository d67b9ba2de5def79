"""Decode steps of the engine by both executors of captured graphs, and what a step costs the host.

``python -m benchmarks.decode``: the executors take turns of a few steps, after a pause in which the other's threads
fall asleep (OpenMP's spin for some milliseconds after each op, on the cores that the next step wants). A step cannot
take less than reading its weights once, at the rate that a sum over as many bytes has in the same run; from some batch
on arithmetic takes longer than that. ``thin`` has 36 layers so narrow that at batch 1 its step is what the host costs;
its ``host`` is CPU time of a step whose captured graph computes nothing, ``ahead`` the same where steps are launched
ahead. ``device`` is the time of a step, one at a time and ahead, whose graph a device beside the host takes 3 ms for.
``weights`` is CPU time of the look at the weights that each step begins with, after a step that read them all.
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
DEVICE = 0.003  # seconds of a step on the simulated device
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


def new_engine(model: Any, batch: int, repeats: int, prompt: int = 64) -> toolkit.Engine:
    """An engine with room for what ``timed_steps`` runs."""
    return toolkit.Engine(model, max_num_seqs=batch, max_model_len=192 + prompt + 8 * repeats)


def timed_steps(
    engines: Mapping[str, toolkit.Engine],
    batch: int,
    repeats: int,
    prompt: int = 64,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of decode steps of ``batch`` sequences in each engine, in turns; the engines are closed.

    Args:
        engines: by side, of ``new_engine``.
        batch: sequences.
        repeats: turns of each engine, ``STEPS`` each.
        prompt: tokens before the first step.
        clock: what is read before and after a step.
    """
    for engine in engines.values():
        params = toolkit.SamplingParams(max_tokens=128 + 8 * repeats, temperature=0.0, ignore_eos=True)
        for at in range(batch):
            engine.submit([3 + at % 7] * prompt, params)
        for _ in range(4 + batch * prompt // 2048):  # the prompts, and the capture
            engine.step()
    seconds: dict[str, list[float]] = {side: [] for side in engines}
    for side in turns(engines, repeats):
        time.sleep(0.05)
        engines[side].step()
        for _ in range(STEPS):
            seconds[side].append(seconds_of(engines[side].step, clock))
    for engine in engines.values():
        engine.close()
    return seconds


def stub(graphs: Any) -> None:
    """Let replays compute nothing: logits are zeros, and so is what is sampled."""
    logits: dict[int, torch.Tensor] = {}

    def forward(context: Any, rows: torch.Tensor, sampling: Any = None) -> torch.Tensor:
        count = len(context.batch.tokens)
        return logits.setdefault(count, torch.zeros(count, 512))

    graphs.forward = forward


def simulate(engine: toolkit.Engine, seconds: float) -> None:
    """Let a step be done so long after its launch, or after the step before it, without taking the host's time."""
    ready = 0.0

    def read_back(result: torch.Tensor) -> Callable[[], torch.Tensor]:
        nonlocal ready
        ready = done = max(ready, time.perf_counter()) + seconds

        def read() -> torch.Tensor:
            time.sleep(max(0.0, done - time.perf_counter()))
            return result

        return read

    engine.runner._read_back = read_back


def seconds_of(function: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> float:
    """Its time by ``clock``; CPU time of this thread, as other processes take turns on the cores."""
    begun = clock()
    function()
    return clock() - begun


def host_seconds(batch: int, repeats: int = 100, ahead: bool = False, device: float = 0.0) -> list[float]:
    """CPU time of decode steps of ``thin`` without their kernels.

    Args:
        batch: sequences.
        repeats: steps.
        ahead: whether they are launched ahead.
        device: seconds of a simulated device for each; the time of steps is then the clock's.
    """
    with toolkit.Engine(thin(), max_num_seqs=batch, max_model_len=512, async_scheduling=ahead) as engine:
        params = toolkit.SamplingParams(max_tokens=450, temperature=0.8, ignore_eos=True)
        for at in range(batch):
            engine.submit([5, 6, 7 + at], params)
        for _ in range(4):
            engine.step()
        engine.synchronize()
        stub(engine.backend.graphs)  # type: ignore[attr-defined]
        if device:
            simulate(engine, device)
        engine.step()
        clock = time.perf_counter if device else time.thread_time
        seconds = [seconds_of(engine.step, clock) for _ in range(repeats)]
        assert engine.stats()["generation_tokens"] >= repeats * batch
        return seconds


HOST = ("host_s", "host_ahead_s", "device_s", "device_ahead_s")


def host_times(batch: int) -> dict[str, float]:
    """What a step of ``thin`` costs the host, and takes beside a device of ``DEVICE`` seconds a step: see ``HOST``."""
    found = [min(host_seconds(batch, ahead=ahead)) for ahead in (False, True)]
    found += [median(host_seconds(batch, ahead=ahead, device=DEVICE)) for ahead in (False, True)]
    return dict(zip(HOST, found, strict=True))


def look_seconds(model: Any, repeats: int) -> list[float]:
    """CPU time of the look at a model's weights, after decode steps of one sequence."""
    with toolkit.Engine(model, max_num_seqs=1, max_model_len=256) as engine:
        engine.submit([3] * 16, toolkit.SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))
        engine.step()
        found = []
        for _ in range(repeats):
            engine.step()
            found.append(seconds_of(engine.see_weights))
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
            host = host_times(batch) if name == "thin" else {}
            medians = {side: median(values) for side, values in seconds.items()}
            ratio = medians["straight line"] / medians["native"]
            ms = [1e3 * one for one in (*(medians[side] for side in SIDES), limit, look)]
            shown = [f"{1e3 * host[key]:.2f}" if host else "" for key in HOST]
            rows.append([name, batch, *ms[:2], f"{ratio:.2f}x", *ms[2:], *shown])
            found.append(
                {"model": name, "batch": batch, "seconds": seconds, "ratio": ratio, "read_s": limit, "look_s": look}
                | host
            )
    header = ["model", "batch", "native ms", "Python ms", "ratio", "reading ms", "weights ms", "host ms", "ahead ms"]
    header += ["device ms", "ahead ms"]
    print_table("a decode step, fp32", header, rows)
    if arguments.json:
        print(f"written to {write_json(arguments.json, {'threads': arguments.threads, 'steps': found})}")


if __name__ == "__main__":
    main()
