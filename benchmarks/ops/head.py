"""A head with its loss against a dense head with cross-entropy and torch's own fused one, in time and peak memory."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import gate, in_fresh_process, peak_rss, print_table
from benchmarks.ops.registry import GATE
from benchmarks.ops.timing import in_turns
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
from toolkit.ops.linear_logprob import linear_logprob

HEAD = {"tokens": 2048, "depth": 512, "vocabulary": 32768}


def head_losses() -> dict[str, Callable[..., Tensor]]:
    """Mean cross-entropy of a head: ours and the peers that this torch has."""
    losses: dict[str, Callable[..., Tensor]] = {
        "ours": lambda x, w, y: linear_cross_entropy(x, w, y) / len(y),
        "linear_logprob": lambda x, w, y: -linear_logprob(x, w, y).logprob.mean(),
        "F.linear, F.cross_entropy": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    }
    fused: Any = getattr(F, "linear_cross_entropy", None)
    if fused is not None:
        chunked = torch.nn.LinearCrossEntropyOptions()
        losses["F.linear_cross_entropy"] = lambda x, w, y: fused(x, w, y)
        losses["F.linear_cross_entropy, chunked"] = lambda x, w, y: fused(x, w, y, options=chunked)
    return losses


def head_inputs() -> tuple[Tensor, Tensor, Tensor]:
    tokens, depth, vocabulary = HEAD.values()
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, depth) * depth**-0.5).requires_grad_()
    return torch.randn(tokens, depth, requires_grad=True), weight, torch.randint(vocabulary, (tokens,))


def measure_head_memory(name: str) -> None:
    """In this process alone: bytes of the peak above weights, inputs and gradients; prints JSON as the last line."""
    hidden, weight, targets = head_inputs()
    loss = head_losses()[name]
    small = hidden[:2].detach().requires_grad_()
    loss(small, weight, targets[:2]).backward()  # code, threads, and the gradient that stays
    hidden.grad = torch.zeros_like(hidden)
    before = peak_rss()
    loss(hidden, weight, targets).backward()
    # The weight's new gradient exists beside the accumulated one on every side.
    print(json.dumps({"extra": peak_rss() - before, "gradient": weight.nbytes}))


def bench_head(seconds: float) -> dict[str, Any]:
    """A head's loss forward and backward: time against the peers, and peak memory of each."""
    hidden, weight, targets = head_inputs()
    losses = head_losses()

    def step(loss: Callable[..., Tensor]) -> list[Tensor]:
        value = loss(hidden, weight, targets)
        return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]

    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    value = losses["F.linear, F.cross_entropy"](*leaves, targets)
    exact = [value.detach(), *torch.autograd.grad(value, leaves)]
    error = max(gate(name, step(losses[name]), exact, GATE) for name in ("ours", "linear_logprob"))
    del leaves, value, exact
    calls = {name: partial(lambda f, _: step(f), f) for name, f in losses.items()}
    taken = in_turns(calls, 1, seconds * 20)
    logits = HEAD["tokens"] * HEAD["vocabulary"] * 4
    memory = {name: in_fresh_process("benchmarks.ops", "--head-memory", name) for name in losses}
    shown = [
        [name, taken[name], f"{taken[name] / taken['ours']:.2f}x", used["extra"] / 2**20,
         (used["extra"] - used["gradient"]) / logits]
        for name, used in memory.items()
    ]  # fmt: skip
    size = "{tokens} tokens x vocabulary size {vocabulary} x {depth}".format(**HEAD)
    title = f"Head and loss, {size}, fp32, forward and backward; the logits are {logits / 2**20:.0f} MiB"
    print_table(title, ["", "seconds", "over ours", "peak MiB", "peak above gradients / logits"], shown)
    return {"seconds": taken, "memory": memory, "logits_bytes": logits, "gate": error}
