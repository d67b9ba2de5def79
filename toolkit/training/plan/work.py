"""Tokens and floating point operations of a step, and the time that they take."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.config import Recipe
from toolkit.training.plan.memory import needs_reference
from toolkit.training.plan.model import LayerSizes

SHARES_OF_GEMM = (1.5, 0.5)
"""Speed of a whole forward and backward over that of one GEMM like its own, measured alone: at best, at worst."""
DECODE_OVERHEAD = 30e-6
"""Seconds of a layer in a step of decoding beside its GEMMs."""


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second.

    Args:
        flops: floating point operations of a GEMM of many rows.
        read_bytes: bytes of weights of a GEMM of few rows.
    """

    flops: float
    read_bytes: float


@dataclass(frozen=True)
class Work:
    """A step of one process.

    Args:
        trained_tokens: that are in its forwards with gradients.
        rolled_tokens: that the engine samples before them.
        at_most: whether the numbers are bounds, as sequences may be shorter.
        flops: of training, and of prompts that the engine reads.
        decode_steps: of the engine.
        decode_flops: of one of them.
        weight_bytes: that one of them reads.
        layers: of the model.
        how: the trained tokens as a product of the recipe's fields.
    """

    trained_tokens: int
    rolled_tokens: int
    at_most: bool
    flops: float
    decode_steps: int
    decode_flops: float
    weight_bytes: float
    layers: int
    how: str

    def seconds(self, speed: Speed) -> tuple[float, float]:
        """On a machine of this speed: at best, at worst."""
        best, worst = (self._seconds(speed, share) for share in SHARES_OF_GEMM)
        return best, worst

    def _seconds(self, speed: Speed, share: float) -> float:
        decode = max(self.decode_flops / speed.flops / share, self.weight_bytes / speed.read_bytes)
        decode += self.layers * DECODE_OVERHEAD
        return self.flops / speed.flops / share + self.decode_steps * decode


def work_of(recipe: Recipe, sizes: LayerSizes, processes: int) -> Work:
    """The work of a step of one of ``processes``."""
    train, objective = recipe.train, recipe.objective
    given: Any = objective
    longest = train.max_length
    rolled = decode_steps = rows = prompts = 0
    forwards_without_gradient = 0
    if objective.supports_gradient_accumulation:
        streams = max((recipe.data.streams or processes) // processes, 1) if objective.kind == "pretrain" else 1
        tokens = train.batch_tokens * train.gradient_accumulation_steps * streams
        how = f"train.batch_tokens {train.batch_tokens:,} x {train.gradient_accumulation_steps} forwards"
        how += f" x {streams} streams" if streams > 1 else ""
    elif hasattr(given, "rollout") and hasattr(given, "prompts"):
        several = given.num_generations
        completion = given.rollout.max_completion_length
        sequences = max(given.prompts // processes, 1) * several
        updates = getattr(given, "num_iterations", 1)
        rolled, tokens = sequences * completion, sequences * completion * updates
        rows = min(given.rollout.max_num_seqs, sequences)
        decode_steps = -(-sequences // rows) * completion
        prompts = max(given.prompts // processes, 1) * (longest - completion)
        forwards_without_gradient = int(needs_reference(objective) or objective.kind in ("distill", "sdft"))
        how = f"objective.prompts {given.prompts} x num_generations {several} x {completion} tokens"
        how += f" x num_iterations {updates}" if updates > 1 else ""
    else:
        name = "lines" if hasattr(given, "lines") else "pairs"
        count = getattr(given, name, 1)
        sides = 1 if name == "lines" else 2
        tokens = max(count // processes, 1) * sides * longest
        forwards_without_gradient = int(needs_reference(objective))
        how = f"objective.{name} {count} x {sides} x train.max_length {longest:,}"
    per_token = 2 * (sizes.matrices + sizes.head) + 2 * longest * sizes.queries  # half of the context on average
    backward = per_token + 2 * (sizes.trained_matrices + sizes.head) + 2 * longest * sizes.queries
    flops = tokens * (per_token * (1 + forwards_without_gradient) + backward) + prompts * per_token
    return Work(
        trained_tokens=tokens,
        rolled_tokens=rolled,
        at_most=not objective.supports_gradient_accumulation,
        flops=float(flops),
        decode_steps=decode_steps,
        decode_flops=float(rows * per_token),
        weight_bytes=float((sizes.matrices + sizes.head) * getattr(torch, recipe.forward_dtype).itemsize),
        layers=sizes.layers,
        how=how,
    )


def measure_speed(recipe: Recipe, sizes: LayerSizes, seconds: float = 0.3) -> Speed:
    """The speed of this machine's GEMMs in the recipe's dtype, on shapes like the model's.

    Args:
        seconds: to measure each of the two for.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, recipe.forward_dtype)
    width = max(sizes.hidden, 16)
    tall = torch.ones(min(recipe.train.batch_tokens, 4096), width, dtype=dtype, device=device)
    weight = torch.ones(width, min(4 * width, 16384), dtype=dtype, device=device)
    rate = _rate(tall, weight, seconds)
    few = _rate(tall[:1], weight, seconds)
    return Speed(flops=2 * tall.numel() * weight.shape[1] * rate, read_bytes=weight.numel() * weight.itemsize * few)


def _rate(rows: torch.Tensor, weight: torch.Tensor, seconds: float) -> float:
    """GEMMs per second."""
    rows @ weight
    count, begun = 0, time.perf_counter()
    while True:
        out = rows @ weight
        count += 1
        if out.is_cuda:
            torch.cuda.synchronize()
        passed = time.perf_counter() - begun
        if passed > seconds:
            return count / passed
