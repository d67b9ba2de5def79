"""Training clients in process: an engine with a small model, and requests of clients as data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from toolkit.engine import AsyncEngine, Engine, SamplingParams
from toolkit.live import Example, LiveConfig, LiveTraining
from toolkit.patching import patch
from toolkit.testing.models import random_model

WAIT = 120.0
"""Seconds that a test waits for a result that comes much sooner."""


@contextmanager
def live_engine(family: str = "llama") -> Iterator[AsyncEngine]:
    """An engine with a small random model, patched in bitwise mode."""
    torch.manual_seed(0)
    model = random_model(family)
    patch(model)
    with AsyncEngine(Engine(model, num_blocks=256)) as engine:
        yield engine


@contextmanager
def training(engine: AsyncEngine, root: Path, start: bool = True, **config: Any) -> Iterator[LiveTraining]:
    """Training on ``engine``; its clients are gone at the end."""
    live = LiveTraining(engine, LiveConfig(("base",), root, **config))
    if start:
        live.start()
    try:
        yield live
    finally:
        for name in list(live.names):
            live.unload(name).result(WAIT)
        live.close()


def examples(seed: int, count: int, longest: int, samples: bool) -> list[Example]:
    """Random examples, with what a loss of samples reads or with weights."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens = torch.randint(3, 200, (int(torch.randint(2, longest, (), generator=g)) + 1,), generator=g)
        size = len(tokens) - 1
        names = ("logprobs", "advantages") if samples else ("weights",)
        inputs = {name: torch.randn(size, generator=g) for name in names}
        if samples:
            inputs["logprobs"] = inputs["logprobs"] - 5
        found.append(Example(tokens[:-1], tokens[1:], inputs))
    return found


@dataclass
class Script:
    """What a client asks for, in order, and what it got.

    Args:
        name: the client's id.
        rank: of its LoRA.
        seed: of everything else.
    """

    name: str
    rank: int
    seed: int
    futures: dict[int, Any] = field(default_factory=dict)

    @property
    def requests(self) -> list[tuple[str, tuple[Any, ...]]]:
        """(method, arguments behind the number) of its requests."""
        losses = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]

        def forward_backward(at: int, forward_only: bool = False) -> tuple[str, tuple[Any, ...]]:
            loss = losses[(at + self.seed) % len(losses)]
            data = examples(100 * self.seed + at, 2 + at % 3, 24, loss != "cross_entropy")
            return "forward_backward", (data, loss, {}, forward_only)

        step = ("optim_step", ({"learning_rate": 3e-3, "grad_clip_norm": 1.0, "weight_decay": 0.1},))
        return [
            forward_backward(0), step, forward_backward(1), forward_backward(2), step,
            ("snapshot", (False,)), forward_backward(3), forward_backward(4, True), step, ("snapshot", (True,)),
        ]  # fmt: skip

    def create(self, live: LiveTraining) -> None:
        """Its client."""
        self.futures[0] = live.create(self.name, "base", {"rank": self.rank, "seed": self.seed})

    def submit(self, live: LiveTraining, number: int) -> None:
        """The request ``number``, from 1."""
        method, arguments = self.requests[number - 1]
        self.futures[number] = getattr(live, method)(self.name, number, *arguments)

    def outcome(self, live: LiveTraining) -> dict[str, Any]:
        """What it got, its weights, and samples of both its snapshots: tensors and numbers to be equal bit for bit."""
        found: dict[str, Any] = {}
        for number, future in sorted(self.futures.items()):
            result = future.result(WAIT)
            method = "create" if number == 0 else self.requests[number - 1][0]
            if method == "forward_backward":
                found[f"{number}.logprobs"], found[f"{number}.loss"] = torch.cat(result.logprobs), result.loss
            elif method == "optim_step":
                found[f"{number}.norm"] = result
            elif method == "snapshot":
                found[f"{number}.samples"] = sampled(live, result, self.seed)
        tenant = live.tenant(self.name)
        found |= {name: one.detach().clone() for name, one in tenant.parameters.items()}
        return found


def sampled(live: LiveTraining, target: Any, seed: int, prompt: tuple[int, ...] = (5, 6, 7)) -> tuple[Any, ...]:
    """(tokens, log-probabilities) of a seeded sample."""
    with live.sampled(target) as adapter:
        params = SamplingParams(max_tokens=8, seed=seed, lora_name=adapter, ignore_eos=True)
        (completion,) = live.engine.generate([list(prompt)], params)
    return tuple(completion.token_ids), tuple(completion.logprobs)
