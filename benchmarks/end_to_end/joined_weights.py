"""Fast mode with and without joined weights: decode steps and a training step, in turns.

``python -m benchmarks.joined_weights``: two copies of a model, in one of which the weights of queries, keys and values,
and those of gate and up, lie together, so that one GEMM of MKL or cuBLAS serves each group. The logits of both are
compared with those of a float64 model first.
"""

import argparse
import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import CLOCKS, gate, interleaved, llama, print_table, write_json
from benchmarks.end_to_end.decode import new_engine, thin, timed_steps
from benchmarks.end_to_end.narrow import smollm2
from benchmarks.end_to_end.train import make_batch, stepper

LIMIT = 1e-4
"""Of the logits' relative error to float64."""

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama().eval(),
    "smollm2": lambda: smollm2(torch.float32, 30),
    "thin": thin,
}


def sides(name: str, device: str) -> dict[str, Any]:
    """The model with separate weights, and with joined ones."""
    torch.manual_seed(0)
    made = MODELS[name]().to(device)
    exact = copy.deepcopy(made).double()
    found = {"separate": made, "joined": copy.deepcopy(made)}
    for side, model in found.items():
        toolkit.patch(model, numerics="fast", join_weights=side == "joined")
    ids = make_batch(2, 16, made.config.vocab_size).to(device)
    with torch.no_grad():
        values = [model(ids, use_cache=False).logits for model in found.values()]
        gate(f"{name}'s logits", values, [exact(ids, use_cache=False).logits] * 2, LIMIT)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["llama", "smollm2"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 1024], help="of a training step")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="process: on a busy machine, with 1 thread"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]
    rows, found = [], []

    def note(model: str, what: str, seconds: dict[str, list[float]]) -> None:
        separate, joined = (median(seconds[side]) for side in ("separate", "joined"))
        rows.append([model, what, 1e3 * separate, 1e3 * joined, f"{joined / separate:.3f}x"])
        found.append({"model": model, "what": what, "seconds": seconds, "ratio": joined / separate})

    for name in arguments.models:
        models = sides(name, arguments.device)
        for batch in arguments.batch:
            engines = {side: new_engine(model, batch, arguments.repeats) for side, model in models.items()}
            note(name, f"decode, batch {batch}", timed_steps(engines, batch, arguments.repeats, clock=clock))
        for tokens in arguments.tokens:
            ids = make_batch(max(1, tokens // 256), min(tokens, 256), models["joined"].config.vocab_size)
            steps = {side: stepper(model.train(), ids.to(arguments.device)) for side, model in models.items()}
            seconds = interleaved(steps, arguments.repeats, synchronize=arguments.device == "cuda", clock=clock)
            note(name, f"training, {tokens} tokens", seconds)
            for model in models.values():
                model.eval()
    print_table("fast mode, fp32", ["model", "step", "separate ms", "joined ms", "joined / separate"], rows)
    if arguments.json:
        made = {name: getattr(arguments, name) for name in ("threads", "device", "clock")} | {"steps": found}
        print(f"written to {write_json(arguments.json, made)}")


if __name__ == "__main__":
    main()
