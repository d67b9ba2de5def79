"""A mixture of experts, 89 M Qwen3-MoE: training, generation and activations against transformers' implementations.

``python -m benchmarks.moe``: loss and gradients against the unpatched model first, and greedy tokens against
``generate``'s; no speed on a red gate. Then a training step (AdamW) and generation at batch 16, in turns in one
process, and what the block of experts saves for its backward.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import toolkit
from benchmarks.common import MODELS, interleaved, print_table, relative_error, summary, write_json
from benchmarks.serve import Engine, Generate, compare, make_prompts
from benchmarks.train import make_batch, stepper

MODEL = "qwen3_moe"
LIMIT = 1e-5  # of loss and gradients relative to the unpatched model, float32 both


def stock(implementation: str) -> Any:
    """The unpatched model with one of transformers' implementations of its experts."""
    model = MODELS[MODEL]()
    model.set_experts_implementation(implementation)
    return model


def patched() -> Any:
    model = MODELS[MODEL]()
    toolkit.patch(model)
    return model


def gradient_gate(rows: int, length: int) -> dict[str, Any]:
    """Relative errors of loss and of every gradient against the eager loop over experts."""
    losses, gradients = [], []
    for model in (stock("eager").train(), patched().train()):
        ids = make_batch(rows, length, model.config.vocab_size)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    errors = {name: relative_error(gradients[1][name], one) for name, one in gradients[0].items()}
    worst = max(errors, key=lambda name: errors[name])
    loss_error = relative_error(losses[1], losses[0])
    green = loss_error <= LIMIT and errors[worst] <= LIMIT
    print(f"gate: loss error {loss_error:.1e}, worst gradient error {errors[worst]:.1e} ({worst}), limit {LIMIT:.0e}")
    return {"loss_error": loss_error, "worst_gradient": worst, "worst_gradient_error": errors[worst], "green": green}


def saved_bytes(model: Any, tokens: int) -> int:
    """Bytes that the first layer's block of experts keeps for the backward, parameters apart, by storage."""
    block = model.model.layers[0].mlp
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(3), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x)
    out.sum().backward()
    model.zero_grad(set_to_none=True)
    return sum(storages.values())


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, and tokens a second, each implementation and ours."""
    ids = make_batch(arguments.rows, arguments.length, 8192)
    models = {"toolkit": patched(), **{name: stock(name) for name in ("grouped_mm", "eager")}}
    steps: dict[str, Callable[[], float]] = {name: stepper(model.train(), ids) for name, model in models.items()}
    timings = {name: summary(seconds) for name, seconds in interleaved(steps, arguments.repeats).items()}
    speed = {name: ids.numel() / one["median_s"] for name, one in timings.items()}
    saved = {name: saved_bytes(models[name], ids.numel()) for name in ("toolkit", "grouped_mm")}
    rows = [[name, timings[name]["median_s"], speed[name], f"{speed['toolkit'] / speed[name]:.2f}x"] for name in speed]
    print_table(f"training, {ids.numel()} tokens", ["experts", "median s", "tok/s", "toolkit over it"], rows)
    share = saved["toolkit"] / saved["grouped_mm"]
    print(f"saved by a block of experts: {saved['toolkit'] / 2**20:.1f} MiB, {share:.2f}x grouped_mm's")
    return {
        "tokens": ids.numel(),
        "timings": timings,
        "tokens_per_s": speed,
        "saved_bytes": saved,
        "saved_ratio": share,
    }


def generation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each implementation's ``generate`` and of the engine; SystemExit on other tokens."""
    prompts = make_prompts(arguments.batch, arguments.prompt, 8192)
    system = Engine(MODELS[MODEL](), arguments.batch, arguments.prompt + arguments.new_tokens)
    peers = {name: Generate(stock(name)) for name in ("grouped_mm", "eager")}
    reference = peers["grouped_mm"]
    gate = compare(
        reference.model, prompts, system(prompts, arguments.new_tokens), reference(prompts, arguments.new_tokens)
    )
    print(f"gate: greedy tokens {gate}")
    if gate["mismatches"]:
        print("gate red: greedy tokens differ", file=sys.stderr)
        raise SystemExit(1)
    calls: dict[str, Callable[[], Any]] = {"toolkit": lambda: system(prompts, arguments.new_tokens)}
    calls |= {name: partial(peer, prompts, arguments.new_tokens) for name, peer in peers.items()}
    timings = {name: summary(seconds) for name, seconds in interleaved(calls, arguments.repeats, warmup=0).items()}
    speed = {name: arguments.batch * arguments.new_tokens / one["median_s"] for name, one in timings.items()}
    # The last of transformers' three gathers a copy of weights a token; a few tokens of it are enough to see.
    slow, few = Generate(copy.deepcopy(reference.model)), 4
    slow.model.set_experts_implementation("batched_mm")
    short = interleaved({"batched_mm": lambda: slow([prompt[:8] for prompt in prompts], few)}, 1, warmup=0)
    speed["batched_mm"] = arguments.batch * few / short["batched_mm"][0]
    best = max(value for name, value in speed.items() if name != "toolkit")
    rows = [[name, value, f"{speed['toolkit'] / value:.2f}x"] for name, value in speed.items()]
    print_table(f"generation, batch {arguments.batch}", ["experts", "tok/s", "toolkit over it"], rows)
    return {"gate": gate, "timings": timings, "tokens_per_s": speed, "ratio_to_best": speed["toolkit"] / best}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gate = gradient_gate(2, 128)
    if not gate["green"]:
        print("gate red: no speed is reported", file=sys.stderr)
        raise SystemExit(1)
    result = {"model": MODEL, "gate": gate, "training": training(arguments), "generation": generation(arguments)}
    print(f"written to {write_json('moe-qwen3', result)}")


if __name__ == "__main__":
    main()
