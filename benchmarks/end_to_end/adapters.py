"""Decode steps of a batch whose rows choose among many adapters, and of the same batch without, in turns.

``python -m benchmarks.adapters``: SmolLM2-135M's shape with random weights, 16 LoRA adapters of ranks 4 to 64 on every
linear layer, 32 sequences, two of each adapter. Process time says what adapters cost on a machine with other work. The
gate compares tokens and log-probabilities of each adapter in the batch with those that it gives alone, bit by bit.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import CLOCKS, clocked, print_table, turns, write_json
from benchmarks.end_to_end.narrow import smollm2

RANKS = (4, 8, 16, 32, 64)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 3  # timed, of each turn


def save_adapter(model: Any, folder: Path, seed: int, rank: int) -> str:
    """A PEFT folder with an adapter of ``model``, which is left as it is."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False))
    adapted.save_pretrained(str(folder))
    adapted.unload()
    return str(folder)


def prompt(row: int) -> list[int]:
    return [3 + (row * 31 + at * 7) % 997 for at in range(32)]


def params(row: int, name: str | None, most: int) -> toolkit.SamplingParams:
    return toolkit.SamplingParams(max_tokens=most, seed=row, ignore_eos=True, lora_name=name)


def gate(engine: toolkit.Engine, names: list[str], batch: int) -> int:
    """Rows of a batch of all adapters whose tokens or log-probabilities differ from those of the row alone."""
    chosen = [names[row % len(names)] for row in range(batch)]
    together = engine.generate(
        [prompt(row) for row in range(batch)], [params(row, name, 4) for row, name in enumerate(chosen)]
    )
    differing = 0
    for row, name in enumerate(chosen):
        alone = engine.generate([prompt(row)], params(row, name, 4))[0]
        differing += (alone.token_ids, alone.logprobs) != (together[row].token_ids, together[row].logprobs)
    return differing


def steps(engine: toolkit.Engine, sides: dict[str, list[str | None]], batch: int, repeats: int) -> dict[str, Any]:
    """Seconds and process time of decode steps of ``batch`` sequences, for each choice of adapters, in turns."""
    found: dict[str, Any] = {side: {clock: [] for clock in CLOCKS} for side in sides}
    for side in turns(sides, repeats):
        requests = [
            engine.submit(prompt(row), params(row, name, STEPS + 4))
            for row, name in zip(range(batch), itertools.cycle(sides[side]))
        ]
        for _ in range(3):  # the prompts, and a capture
            engine.step()
        for _ in range(STEPS):
            deltas = clocked(engine.step, found[side])
            if len(deltas) != batch:
                raise RuntimeError(f"A step must grow {batch} sequences, got {len(deltas)}.")
        for request in requests:
            engine.cancel(request)
        engine.step()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = smollm2(torch.float32, arguments.layers)
    engine = toolkit.Engine(model, max_num_seqs=arguments.batch, max_model_len=64, numerics="bitwise")
    names = [f"a{at}" for at in range(arguments.adapters)]
    with tempfile.TemporaryDirectory() as folder:
        source = smollm2(torch.float32, arguments.layers)
        for at, name in enumerate(names):
            engine.load_adapter(name, save_adapter(source, Path(folder) / name, at, RANKS[at % len(RANKS)]))
        del source
    differing = gate(engine, names, arguments.batch)
    sides: dict[str, list[str | None]] = {"base": [None], "one adapter": [names[2]], "all adapters": [*names]}
    found = steps(engine, sides, arguments.batch, arguments.repeats)
    medians = {side: {clock: median(values) for clock, values in of.items()} for side, of in found.items()}
    speed = {
        side: {clock: medians["base"][clock] / of[clock] for clock in ("wall", "process")}
        for side, of in medians.items()
    }
    rows = [
        [side, 1e3 * medians[side]["wall"], *(f"{speed[side][clock]:.3f}x" for clock in ("wall", "process"))]
        for side in sides
    ]
    header = ["rows choose", "step ms", "tokens per second", "by process time"]
    print_table(f"decode steps of {arguments.batch} sequences, fp32; {differing} rows differ from alone", header, rows)
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("threads", "layers", "batch", "adapters")}
        kept = {**settings, "ranks": RANKS, "rows that differ": differing, "seconds": found, "speed": speed}
        print(f"written to {write_json(arguments.json, kept)}")
    if differing:
        raise SystemExit(f"{differing} rows differ from the same rows alone.")


if __name__ == "__main__":
    main()
