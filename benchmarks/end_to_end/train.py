"""A training step, patched against unpatched: loss and gradients first, then time, then peak memory.

``python -m benchmarks.train``: same weights, same batch, AdamW. Each side trains in a separate process and takes its
steps in turn with the other; peak memory is the process's.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from benchmarks.common import (
    MODELS,
    in_turns,
    print_table,
    relative_error,
    summary,
    take_steps,
    write_json,
)

# Largest relative error of the loss and of any parameter's gradient, by dtype.
GATE = {torch.float64: 1e-10, torch.float32: 1e-5}


class NoFloat32(TorchFunctionMode):
    """Turns conversions to float32 into float64 ones.

    Stock modules take norms, rotary tables and the loss in float32 even in a float64 model, which would hide
    errors below 1e-8 behind their rounding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **named)


def make_model(name: str, side: str = "unpatched") -> Any:
    """A side: ``patched``, ``unpatched``, or unpatched with one of transformers' implementations of experts."""
    model = MODELS[name]()
    if side == "patched":
        import toolkit

        toolkit.patch(model)
    elif side != "unpatched":
        model.set_experts_implementation(side)
    return model.train()


def steps_in_turns(
    model: str, sides: Sequence[str], rows: int, length: int, threads: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Seconds of the sides' steps, and their memory."""
    sizes = ["--model", model, "--rows", str(rows), "--length", str(length), "--threads", str(threads)]
    return in_turns("benchmarks.end_to_end.train", {side: ["--side", side, *sizes] for side in sides}, repeats)


def make_batch(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))


def stepper(model: Any, ids: torch.Tensor) -> Callable[[], float]:
    """One optimizer step on the same batch: forward with labels, backward, AdamW (fused, as transformers' Trainer and
    ``toolkit train`` take it)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def gradient_gate(name: str, dtype: torch.dtype, rows: int, length: int) -> dict[str, Any]:
    """Relative errors of loss and gradients of the patched model against the unpatched one."""
    stock, patched = MODELS[name]().to(dtype).train(), make_model(name).to(dtype)
    import toolkit

    toolkit.patch(patched)
    ids = make_batch(rows, length, stock.config.vocab_size)
    losses = []
    for model in (stock, patched):
        with NoFloat32() if dtype == torch.float64 else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    mine = dict(patched.named_parameters())
    errors = {key: relative_error(mine[key].grad, p.grad) for key, p in stock.named_parameters() if p.grad is not None}
    worst = max(errors, key=lambda key: float("inf") if errors[key] != errors[key] else errors[key])
    loss_error = relative_error(losses[1], losses[0])
    limit = GATE[dtype]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "loss": float(losses[0]),
        "loss_error": loss_error,
        "worst_gradient": worst,
        "worst_gradient_error": errors[worst],
        "limit": limit,
        "green": loss_error <= limit and errors[worst] <= limit,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    gates = [
        gradient_gate(arguments.model, torch.float64, 2, 48),
        gradient_gate(arguments.model, torch.float32, 2, 128),
    ]
    for gate in gates:
        print(
            f"gate {gate['dtype']}: loss error {gate['loss_error']:.1e}, worst gradient error "
            f"{gate['worst_gradient_error']:.1e} ({gate['worst_gradient']}), limit {gate['limit']:.0e}"
        )
    if not all(gate["green"] for gate in gates):
        print("the gate failed: no speed is reported", file=sys.stderr)
        raise SystemExit(1)

    sides = ("patched", "unpatched")
    seconds, memory = steps_in_turns(
        arguments.model, sides, arguments.rows, arguments.length, arguments.threads, arguments.repeats
    )
    timings = {side: summary(seconds[side]) for side in sides}
    tokens = arguments.rows * arguments.length
    speed = {side: tokens / timings[side]["median_s"] for side in sides}
    ratios = {
        "time": timings["patched"]["median_s"] / timings["unpatched"]["median_s"],
        "memory": memory["patched"]["peak"] / memory["unpatched"]["peak"],
    }
    rows = [
        [side, timings[side]["median_s"], timings[side]["min_s"], speed[side], memory[side]["peak"] / 2**30]
        for side in sides
    ]
    rows.append(
        [
            "patched / unpatched",
            f"{ratios['time']:.3f}x",
            "",
            f"{1 / ratios['time']:.3f}x",
            f"{ratios['memory']:.3f}x",
        ]
    )
    size = f"{arguments.rows}x{arguments.length} tokens, {arguments.threads} threads"
    title = f"{arguments.model}, fp32, AdamW, {size}"
    print_table(title, ["side", "median s", "min s", "tok/s", "peak GiB"], rows)
    return {
        "model": arguments.model,
        "tokens": tokens,
        "gates": gates,
        "timings": timings,
        "tokens_per_s": speed,
        "memory_bytes": memory,
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        model = make_model(arguments.model, arguments.side)
        take_steps(stepper(model, make_batch(arguments.rows, arguments.length, model.config.vocab_size)))
        return
    path = write_json(f"train-{arguments.model}", run(arguments))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
