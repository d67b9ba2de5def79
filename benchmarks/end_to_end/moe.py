"""An MoE model on CPU: the op, a training step, generation and saved memory, against transformers' own.

``python -m benchmarks.moe``: the 89 M Qwen3-MoE of ``benchmarks.common``. The peers are transformers' experts
implementations, ``grouped_mm`` and ``eager``; generation is compared with the fastest of them. Every part comes after
its gate; calls are timed in turns, each side of a training step in a separate process. Ratios are of medians; above 1
ours is faster.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import toolkit
from benchmarks.common import both_ways, gate, interleaved, print_table, qwen3_moe, summary, write_json
from benchmarks.end_to_end.serve import Engine, Generate, compare, make_prompts
from benchmarks.end_to_end.train import gradient_gate, steps_in_turns
from toolkit.moe import ExpertLayout, ExpertWeights, moe_forward

PEERS = ("grouped_mm", "eager")
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
GATE = 1e-5  # largest relative error of the op's outputs and gradients against float64
TRIED_TOKENS = 4  # new tokens by which transformers' fastest implementation is found


def with_experts(model: Any, implementation: str) -> Any:
    """A copy of the model whose experts run as this implementation of transformers."""
    other = copy.deepcopy(model)
    other.set_experts_implementation(implementation)
    return other


def patched(model: Any) -> Any:
    other = copy.deepcopy(model)
    toolkit.patch(other)
    return other


def block(tokens: int, stock: Any) -> tuple[Any, list[Tensor], Tensor]:
    """The first layer's experts, and (hidden, scores, ids) for so many tokens routed evenly at random."""
    experts, config = stock.model.layers[0].mlp.experts, stock.config
    generator = torch.Generator().manual_seed(3)
    keys = torch.rand(tokens, config.num_experts, generator=generator)
    scores, ids = keys.topk(config.num_experts_per_tok, -1)
    hidden = torch.randn(tokens, config.hidden_size, generator=generator)
    return experts, [hidden, scores / scores.sum(-1, keepdim=True), experts.gate_up_proj, experts.down_proj], ids


def bench_op(stock: Any, repeats: int) -> dict[str, Any]:
    """The experts alone, at a training batch and a decode step: forward, and forward with backward."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    result: dict[str, Any] = {}
    rows = []
    for tokens in (2048, 16):
        experts, inputs, ids = block(tokens, stock)

        def ours(x: Tensor, s: Tensor, up: Tensor, down: Tensor, ids: Tensor = ids) -> Tensor:
            return moe_forward(x, ids, s, ExpertWeights(up, down, ExpertLayout("silu")))

        def theirs(x: Tensor, s: Tensor, *_: Tensor, ids: Tensor = ids, experts: Any = experts) -> Tensor:
            return grouped_mm_experts_forward(experts, x, ids, s)

        leaves = [value.detach().requires_grad_() for value in inputs]
        peer_leaves = [*leaves[:2], experts.gate_up_proj, experts.down_proj]
        grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(4))
        upcast = [value.detach().double() for value in inputs]
        exact = both_ways(partial(_loop, ids), upcast, [grad.double()])
        worst = gate("experts", both_ways(ours, inputs, [grad]), exact, GATE)

        def forward(function: Callable[..., Tensor], values: list[Tensor]) -> Callable[[], None]:
            def call() -> None:
                with torch.no_grad():
                    function(*values)

            return call

        def training(
            function: Callable[..., Tensor], values: list[Tensor], grad: Tensor = grad
        ) -> Callable[[], object]:
            return lambda: torch.autograd.grad(function(*values), values, grad)

        for what, made in (("forward", forward), ("forward and backward", training)):
            calls = {"ours": made(ours, leaves), "grouped_mm": made(theirs, peer_leaves)}
            turns = repeats if tokens > 256 else 8 * repeats
            seconds = {name: summary(times) for name, times in interleaved(calls, turns, warmup=2).items()}
            ratio = seconds["grouped_mm"]["median_s"] / seconds["ours"]["median_s"]
            result[f"{tokens} tokens, {what}"] = {"seconds": seconds, "ratio": ratio, "gate": worst}
            rows.append([f"{tokens} tokens, {what}", *(1e3 * s["median_s"] for s in seconds.values()), f"{ratio:.2f}x"])
    print_table("experts: 32 of 3 x 512 x 256, 4 a token", ["", "ours ms", "grouped_mm ms", "ratio"], rows)
    return result


def _loop(ids: Tensor, x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The experts one by one: what float64 is asked for."""
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        token, slot = torch.where(ids == e)
        gate_part, up_part = (x[token] @ up[e].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate_part) * up_part) @ down[e].T
        out = out.index_add(0, token, y * scores[token, slot, None])
    return out


def bench_memory(stock: Any, tokens: int) -> dict[str, Any]:
    """Bytes that a layer's experts keep for their backward, each storage once, parameters left out."""
    sides = {"patched": patched(stock), **{name: with_experts(stock, name) for name in PEERS}}
    found = {}
    for name, model in sides.items():
        experts, (hidden, scores, *_), ids = block(tokens, model)
        own = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
        storages: dict[int, int] = {}

        def note(value: Tensor, own: set[int] = own, storages: dict[int, int] = storages) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            out = experts(hidden.requires_grad_(), ids, scores.requires_grad_())
        found[name] = sum(storages.values())  # `out` keeps what was noted alive, so that no address is used twice
        del out
    ratio = found["patched"] / found["grouped_mm"]
    rows = [[name, size / 2**20, f"{size / found['grouped_mm']:.2f}x"] for name, size in found.items()]
    print_table(f"saved for the backward of one layer's experts, {tokens} tokens", ["", "MiB", "of grouped_mm"], rows)
    return {"tokens": tokens, "bytes": found, "ratio": ratio}


def bench_training(rows: int, length: int, threads: int, repeats: int) -> dict[str, Any]:
    """A step with AdamW; gate: loss and gradients against the model as it was, in float64 and float32."""
    gates = [
        gradient_gate("qwen3_moe", torch.float64, 2, 48),
        gradient_gate("qwen3_moe", torch.float32, 2, 128),
    ]
    for one in gates:
        print(
            f"gate {one['dtype']}: loss error {one['loss_error']:.1e}, worst gradient {one['worst_gradient_error']:.1e}"
        )
    if not all(one["green"] for one in gates):
        print("the gate failed: no speed is reported", file=sys.stderr)
        raise SystemExit(1)
    sides = ("patched", *PEERS)
    taken, memory = steps_in_turns("qwen3_moe", sides, rows, length, threads, repeats)
    seconds = {name: summary(times) for name, times in taken.items()}
    speed = {name: rows * length / times["median_s"] for name, times in seconds.items()}
    shown = [[name, seconds[name]["median_s"], speed[name], f"{speed['patched'] / speed[name]:.2f}x"] for name in sides]
    print_table(f"training step, {rows}x{length} tokens, AdamW", ["", "median s", "tok/s", "patched is"], shown)
    ratios = {name: speed["patched"] / speed[name] for name in PEERS}
    return {
        "tokens": rows * length,
        "gates": gates,
        "seconds": seconds,
        "tokens_per_s": speed,
        "memory_bytes": memory,
        "ratios": ratios,
    }


def bench_generation(stock: Any, batch: int, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """The engine against ``generate`` on transformers' fastest experts; gate: greedy tokens but for near ties."""
    prompts = make_prompts(batch, prompt, stock.config.vocab_size)
    models = {name: Generate(with_experts(stock, name)) for name in IMPLEMENTATIONS}
    trials = {name: lambda m=model: m(prompts, TRIED_TOKENS) for name, model in models.items()}
    tried = {name: times[0] for name, times in interleaved(trials, 1, warmup=0).items()}
    best = min(tried, key=tried.__getitem__)
    system = Engine(copy.deepcopy(stock), batch, prompt + new_tokens)
    counts = compare(stock, prompts, system(prompts, new_tokens), models[best](prompts, new_tokens))
    print(f"gate: {counts}; transformers' fastest: {best}", flush=True)
    if counts["mismatches"]:
        print("the gate failed: no speed is reported", file=sys.stderr)
        raise SystemExit(1)
    calls = {"engine": lambda: system(prompts, new_tokens), best: lambda: models[best](prompts, new_tokens)}
    seconds = {name: summary(times) for name, times in interleaved(calls, repeats, warmup=0).items()}
    speed = {name: batch * new_tokens / times["median_s"] for name, times in seconds.items()}
    ratio = speed["engine"] / speed[best]
    rows = [[name, value, f"{value / speed[best]:.2f}x"] for name, value in speed.items()]
    print_table(f"generation, batch {batch}, {prompt} + {new_tokens} tokens, greedy", ["", "tok/s", "ratio"], rows)
    return {
        "batch": batch, "prompt": prompt, "new_tokens": new_tokens, "gate": counts, "tried_s": tried, "best": best,
        "seconds": seconds, "tokens_per_s": speed, "ratio": ratio,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("op", "memory", "training", "generation")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stock = qwen3_moe()
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "op": lambda: bench_op(stock, arguments.repeats),
        "memory": lambda: bench_memory(stock, arguments.rows * arguments.length),
        "training": lambda: bench_training(arguments.rows, arguments.length, arguments.threads, arguments.repeats),
        "generation": lambda: bench_generation(
            stock, arguments.batch, arguments.prompt, arguments.new_tokens, arguments.repeats
        ),
    }
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in stock.parameters())}
    for part in arguments.only:
        result[part] = measured[part]()
    if set(arguments.only) == set(parts):
        print(f"written to {write_json('moe', result)}")


if __name__ == "__main__":
    main()
