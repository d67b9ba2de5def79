"""What limits rollout and training: the arithmetic of ``docs/sizing.md`` beside what is measured here.

    python -m benchmarks.sizing --plot docs/sizing.svg

Three parts, each a formula whose constants are measured on their own, and points that it must meet: a weight update by
a folder and by shared memory, over sizes of models; rollout and training one after the other and side by side, in two
processes of one thread; and rollouts whose samples have unequal lengths. Writes results/sizing.json and
a plot. Wall-clock seconds: the machine should have nothing else to do.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import toolkit
from benchmarks.common import RESULTS, describe, llama
from toolkit.engine.new_weights import write_new_weights
from toolkit.loading import read_new_weights
from toolkit.loading.weight_folders import WeightFolders
from toolkit.strict_json import strict_json
from toolkit.training.rollout_worker import ModelSpec, Worker, packed

PROMPT = 32
ENGINE: dict[str, Any] = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
    "max_model_len": 1024,
    "enable_prefix_caching": False,
}


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def num_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters, tied ones once."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def _packed_copies(state: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """As an object store copies them into memory that it shares."""
    return [one.data.copy() for one in packed(state).values()]


def updates(layers: list[int], repeats: int) -> dict[str, Any]:
    """Of each size: bytes of a folder, seconds to write and read it, to pack into memory, to write into parameters."""
    points = []
    for count in layers:
        model = llama(num_hidden_layers=count)
        toolkit.patch(model)
        with (
            toolkit.AsyncEngine(toolkit.Engine(model, max_model_len=64)) as engine,
            tempfile.TemporaryDirectory() as at,
        ):
            folders = WeightFolders(at)
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            folder = folders.write(state)
            on_disk = sum(one.stat().st_size for one in folder.iterdir())
            point: dict[str, Any] = {"layers": count, "parameters": num_bytes(model), "on_disk": on_disk}
            for part, call in (
                ("write", partial(folders.write, state)),
                ("read", partial(read_new_weights, str(folder), model)),
                ("pack", partial(_packed_copies, state)),
                ("load", partial(write_new_weights, engine, model, state)),
            ):
                point[part] = seconds(call, repeats)
            points.append(point)
    gb = [one["parameters"] / 1e9 for one in points]
    rates = {}
    for path, parts in {"folder": ("write", "read", "load"), "shared memory": ("pack", "load")}.items():
        taken = [sum(one[part] for part in parts) for one in points]
        slope, start = np.polyfit(gb, taken, 1) if len(gb) > 1 else (taken[0] / gb[0], 0.0)
        rates[path] = {"start": float(start), "seconds_per_gb": float(slope), "seconds": taken}
    return {"points": points, "fits": rates}


def _serve(pipe: Connection, spec: ModelSpec, weights: Any) -> None:
    """A rollout worker in a separate process with one thread."""
    torch.set_num_threads(1)

    async def run() -> None:
        worker = Worker()
        await worker.start(spec, None, ENGINE, 0, weights)
        pipe.send("ready")
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            version, state, prompts, params = asked
            begun = time.perf_counter()
            if state is not None:
                await worker.load(version, state)
            loaded = time.perf_counter()
            groups = await asyncio.gather(*(worker.generate(prompt, params) for prompt in prompts))
            sequences = [[*prompt, *one.token_ids] for prompt, group in zip(prompts, groups) for one in group]
            pipe.send((sequences, loaded - begun, time.perf_counter() - loaded))
        worker.engine.shutdown()

    asyncio.run(run())


def overlap(layers: int, completion: int, samples: list[int], steps: int) -> dict[str, Any]:
    """Seconds of a step, one after the other and side by side, for rollouts of several sizes of the same training."""
    torch.set_num_threads(1)
    model = llama(num_hidden_layers=layers)
    toolkit.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    config = type(model.config).from_dict(model.config.to_dict())
    dtypes = {name: one.dtype for name, one in model.named_parameters()}
    spec = ModelSpec(type(model), config, model.generation_config, dtypes, "cpu", None)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, spec, packed(model.state_dict())), daemon=True)
    process.start()
    ours.recv()
    version = 0

    def ask(count: int) -> None:
        nonlocal version
        version += 1
        params = toolkit.SamplingParams(max_tokens=completion, ignore_eos=True, seed=version)
        prompts = torch.randint(0, 8192, (count, PROMPT)).tolist()
        ours.send((version, packed(model.state_dict()), prompts, params))

    def train(sequences: list[list[int]]) -> float:
        begun = time.perf_counter()
        loss = -torch.cat(toolkit.token_logprobs(model, sequences)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    points = []
    for count in samples:
        point: dict[str, Any] = {"samples": count}
        for mode in ("warm", "one after the other", "side by side"):
            ask(count)
            kept, parts = ours.recv()[0], []
            begun = time.perf_counter()
            for _ in range(steps):
                ask(count)
                if mode == "side by side":  # trains on what the step before has sampled: one update behind
                    trained = train(kept[:64])
                kept, loaded, rolled = ours.recv()
                if mode != "side by side":
                    trained = train(kept[:64])
                parts.append((loaded, rolled, trained))
            point[mode] = (time.perf_counter() - begun) / steps
            if mode == "one after the other":
                point |= dict(zip(("load", "rollout", "train"), np.median(parts, axis=0).tolist()))
        point["send"] = max(point["one after the other"] - point["load"] - point["rollout"] - point["train"], 0.0)
        point["predicted"] = point["send"] + max(point["load"] + point["rollout"], point["train"])
        points.append(point)
    ours.send(None)
    process.join(60)
    return {"layers": layers, "completion": completion, "points": points}


def lengths_of(kind: str, count: int, most: int) -> list[int]:
    """Lengths of samples, the same at every call."""
    random = np.random.default_rng(0)
    sampled = {
        "equal": np.full(count, most // 2),
        "uniform": random.integers(1, most + 1, count),
        "exponential": random.exponential(most / 4, count),
        "log-normal": random.lognormal(np.log(most / 8), 1.0, count),
    }[kind]
    return np.clip(np.round(sampled), 1, most).astype(int).tolist()


def stragglers(layers: int, count: int, most: int, repeats: int) -> dict[str, Any]:
    """Seconds of rollouts by the lengths of their samples, and those that the cost of a step of so many rows gives."""
    model = llama(num_hidden_layers=layers)
    toolkit.patch(model)

    def rollout(engine: toolkit.Engine, lengths: list[int]) -> None:
        params = [toolkit.SamplingParams(max_tokens=one, ignore_eos=True, seed=at) for at, one in enumerate(lengths)]
        engine.generate(torch.randint(0, 8192, (len(lengths), PROMPT)).tolist(), params)

    with toolkit.Engine(model, **ENGINE, seed=0) as engine:
        rows = sorted({1, max(count // 4, 1), max(count // 2, 1), count})
        short, long = max(most // 8, 1), max(most // 2, 2)
        costs = []  # of a step: the prompts' part falls out of the difference
        for width in rows:
            taken = [seconds(partial(rollout, engine, [each] * width), repeats) for each in (short, long)]
            costs.append((taken[1] - taken[0]) / (long - short))
        first = seconds(partial(rollout, engine, [1] * count), repeats)
        points = []
        for kind in ("equal", "uniform", "exponential", "log-normal"):
            lengths = lengths_of(kind, count, most)
            alive = [sum(one > at for one in lengths) for at in range(1, max(lengths))]
            predicted = first + float(np.interp(alive, rows, costs).sum())
            measured = seconds(partial(rollout, engine, lengths), repeats)
            points.append(
                {
                    "lengths": kind, "mean": statistics.mean(lengths), "longest": max(lengths), "measured": measured,
                    "predicted": predicted, "rows": sum(lengths) / max(lengths) / count,
                }
            )  # fmt: skip
    return {"rows": rows, "seconds_per_step": costs, "prompts": first, "samples": count, "points": points}


def plot(found: dict[str, Any], file: Path) -> None:
    """Formulas as lines, measured points as dots."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    points = found["updates"]["points"]
    gb = [one["parameters"] / 1e9 for one in points]
    for name, fit in found["updates"]["fits"].items():
        left.plot(gb, fit["seconds"], "o", label=name)
        left.plot(gb, [fit["start"] + fit["seconds_per_gb"] * one for one in gb], "-", color=left.lines[-1].get_color())
    left.set(title="weight update", xlabel="GB of parameters", ylabel="seconds")
    left.legend()
    points = found["overlap"]["points"]
    ratios = [one["rollout"] / one["train"] for one in points]
    middle.plot(ratios, [one["one after the other"] / one["side by side"] for one in points], "o", label="measured")
    line = [one["one after the other"] / one["predicted"] for one in points]
    middle.plot(ratios, line, "-", label="sum / longer one")
    middle.set(title="overlap", xlabel="rollout / training, seconds", ylabel="times as fast", xscale="log")
    middle.legend()
    points = found["stragglers"]["points"]
    right.plot([one["predicted"] for one in points], [one["measured"] for one in points], "o")
    for one in points:
        right.annotate(one["lengths"], (one["predicted"], one["measured"]))
    most = max(one["predicted"] for one in points) * 1.1
    right.plot([0, most], [0, most], "-")
    right.set(title="unequal lengths", xlabel="formula, seconds", ylabel="measured, seconds")
    figure.tight_layout()
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--overlap-layers", type=int, default=2)
    parser.add_argument("--completion", type=int, default=32, help="tokens of a sample of the overlap")
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32, help="samples of the rollouts of unequal lengths")
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=RESULTS / "sizing.svg")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": describe(), "updates": updates(args.layers, args.repeats)}
    for one in found["updates"]["points"]:
        assert abs(one["on_disk"] / one["parameters"] - 1) < 0.05, one  # a folder has the parameters and no more
    found["stragglers"] = stragglers(args.overlap_layers, args.rows, args.longest, args.repeats)
    found["overlap"] = overlap(args.overlap_layers, args.completion, args.samples, args.steps)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "sizing.json").write_text(strict_json(found, indent=1) + "\n")
    plot(found, args.plot)
    _show(found)


def _show(found: dict[str, Any]) -> None:
    for one in found["updates"]["points"]:
        parts = ", ".join(f"{part} {one[part]:.3f}" for part in ("write", "read", "pack", "load"))
        print(f"update of {one['parameters'] / 1e6:.1f} MB ({one['on_disk'] / 1e6:.1f} MB on disk): seconds {parts}")
    for name, fit in found["updates"]["fits"].items():
        print(f"  {name}: {fit['start']:.3f} s + {fit['seconds_per_gb']:.2f} s/GB")
    for one in found["overlap"]["points"]:
        print(
            f"{one['samples']} samples: rollout {one['rollout']:.2f} s, training {one['train']:.2f} s, one after the "
            f"other {one['one after the other']:.2f} s, side by side {one['side by side']:.2f} s, formula "
            f"{one['predicted']:.2f} s"
        )
    for one in found["stragglers"]["points"]:
        print(
            f"{one['lengths']} lengths, mean {one['mean']:.0f}, longest {one['longest']}: {one['measured']:.2f} s, "
            f"formula {one['predicted']:.2f} s, {one['rows']:.0%} of the rows at work"
        )


if __name__ == "__main__":
    main()
