"""Checks of a patched model in two processes, in any training loop; the scripts of the loops run them.

A loop trains on half of each batch in each process; one process of unpatched transformers trains on all of it.
"""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import toolkit
from toolkit.errors import ToolkitError
from toolkit.patching import weight_version
from toolkit.testing.models import random_model

STEPS, RATE, CLIP, TOLERANCE = 4, 1e-2, 1.0, 1e-4
GREEDY = toolkit.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

Step = Callable[[Tensor], None]
Loss = Callable[[nn.Module, Tensor], Tensor]


def small_model(family: str) -> Any:
    """The same weights every time."""
    return random_model(family, hidden=32, vocabulary=97).train()


def batch(step: int, rank: int = 0, size: int = 1) -> Tensor:
    """Rows of tokens [4 / size, 12]: this rank's part of a step's batch."""
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(step))
    return ids.chunk(size)[rank]


def own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss inside of the model's forward."""
    return model(ids, labels=ids).loss


def loss_of_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss behind the model's forward, when its parameters may be sharded again."""
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def loss_of_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """The same by the ragged forward of an objective."""
    return -torch.cat(toolkit.token_logprobs(model, list(ids))).mean()


def loss_of_checkpoints(model: nn.Module, ids: Tensor) -> Tensor:
    """The same, every layer's forward run again in the backward."""
    getattr(model, "module", model).gradient_checkpointing_enable()
    return loss_of_logprobs(model, ids)


CASES: list[tuple[str, bool, Loss]] = [
    ("llama", False, own_loss),
    ("llama", True, own_loss),
    ("llama", True, loss_of_logits),
    ("llama", True, loss_of_checkpoints),
    ("gemma", True, own_loss),  # head and embedding are one parameter
    ("deepseek_v3_moe", True, loss_of_logprobs),  # attention reads a projection's weight, experts their own
]


@cache
def train_alone(family: str) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Loss of each step, and the weights before the first and after each."""
    model = small_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses, weights = [], [_copy(model)]
    for step in range(STEPS):
        loss = own_loss(model, batch(step))
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(_copy(model))
    return losses, weights


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(wrapped: nn.Module, loss_of: Loss, step: Step, steps: range) -> list[float]:
    """Mean loss over the processes of each of ``steps``; ``step`` takes a loss through backward and optimizer."""
    rank, size = dist.get_rank(), dist.get_world_size()
    losses = []
    for at in steps:
        loss = loss_of(wrapped, batch(at, rank, size))
        step(loss)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / size)
    return losses


def check_training(
    family: str,
    patched: bool,
    loss_of: Loss,
    prepare: Callable[[Any], tuple[nn.Module, Step]],
    gathered: Callable[[Any], AbstractContextManager[None]],
) -> None:
    """Loss of every step and weights after the last are those of one process. prepare: model to (wrapped, step)."""
    model = small_model(family)
    if patched:
        toolkit.patch(model)
        assert {"head", "norm", "attention"} <= set(toolkit.patch(model).roles())
    wrapped, step = prepare(model)
    losses, (expected, weights) = train(wrapped, loss_of, step, range(STEPS)), train_alone(family)
    case = f"{family} patched={patched} {loss_of.__name__}"
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= TOLERANCE, (case, losses, expected)
    with gathered(model):
        check_weights(model.state_dict(), weights[-1], case)


def check_nothing_counted(
    prepare: Callable[[Any], tuple[nn.Module, Step]], gathered: Callable[[Any], AbstractContextManager[None]]
) -> None:
    """A step in which one process has no label is a step on the other's rows; one in which none has is one on none."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, stock = small_model("llama"), small_model("llama")
    toolkit.patch(model)
    wrapped, step = prepare(model)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=RATE)
    ids = batch(0, 0, size)
    nothing = torch.full_like(ids, -100)
    for labels in (ids, nothing):
        optimizer.zero_grad()
        stock(ids, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(stock.parameters(), CLIP)
        optimizer.step()
        count = (labels[:, 1:] != -100).sum() / size  # gradients are averaged over the processes
        step(wrapped(ids, labels=nothing if rank else labels, num_items_in_batch=count).loss)
    with gathered(model):
        check_weights(model.state_dict(), stock.state_dict(), "nothing counted")


def check_weights(got: dict[str, Tensor], expected: dict[str, Tensor], case: str) -> None:
    """Every weight to ``TOLERANCE``."""
    assert got.keys() == expected.keys(), case
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= TOLERANCE, (case, name)


def check_rollout(
    prepare: Callable[[Any], tuple[nn.Module, Step]],
    gathered: Callable[[Any], AbstractContextManager[None]],
    folder: Path,
    sharded: bool,
) -> None:
    """A phase of rollout before each step: tokens, bits, weight version, saved state; losses as if there were none."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = small_model("llama")
    toolkit.patch(model)
    wrapped, step = prepare(model)
    expected, weights = train_alone("llama")
    # Processes may roll out different prompts: the first has two more.
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12] * 5][: 3 - 2 * rank]
    losses: list[float] = []
    versions, graphs = set(), []
    engine = None
    for at in range(STEPS):
        with gathered(model):
            engine = engine or toolkit.Engine(model)
            version = weight_version(model)
            outputs = engine.generate(prompts, GREEDY)
            assert weight_version(model) == version
            alone = small_model("llama").eval()
            alone.load_state_dict(model.state_dict())
            check_weights(alone.state_dict(), weights[at], f"rollout before step {at}")
            for prompt, output in zip(prompts, outputs, strict=True):
                assert output.token_ids == greedy(alone, prompt)
                again = toolkit.token_logprobs(model, [prompt + output.token_ids])[0][len(prompt) - 1 :]
                assert torch.equal(torch.tensor(output.logprobs), again.detach())
            if at == STEPS - 1 and rank == 0:
                toolkit.export(model, folder)
        versions.add(version)
        graphs.append(dict(engine.backend.graphs._graphs))
        logits = model(batch(at)).logits
        losses += train(wrapped, own_loss, step, range(at, at + 1))
        assert weight_version(model) != version
        if not sharded:
            refused("logits were not read before the weights changed", lambda logits=logits: logits + 0)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= TOLERANCE
    assert len(versions) == STEPS
    assert graphs[0]
    assert graphs[-1] == graphs[0]  # captured once, around parameters that come back to their storage
    if sharded:
        refused("must be gathered for generating", lambda: engine.generate(prompts, GREEDY))
        refused("must be gathered for patching", lambda: toolkit.patch(model, roles=["norm"]))
    dist.barrier()
    check_saved(folder, weights[STEPS - 1])
    assert size == 2


def refused(why: str, use: Callable[[], Any]) -> None:
    """``use`` is a ToolkitError that says ``why``."""
    with pytest.raises(ToolkitError, match=re.escape(why)):
        use()


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Of unpatched transformers."""
    settings = {"max_new_tokens": GREEDY.max_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


def check_saved(folder: Path, expected: dict[str, Tensor] | None) -> None:
    """Unpatched transformers opens it, with these weights where they are known."""
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert type(opened).__name__ in ("LlamaForCausalLM", "Qwen3MoeForCausalLM")
    if expected is not None:
        check_weights(opened.state_dict(), expected, "saved")


def run_example(title: str, folder: Path) -> None:
    """The script under a heading of docs/distributed.md, and what it exported."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    (block,) = re.findall(rf"## {title}\n\n```python\n(.*?)```", text, re.S)
    exec(compile(block, f"docs/distributed.md: {title}", "exec"), {"folder": folder})
    dist.barrier()
    check_saved(folder / "exported", None)


def finish() -> None:
    """Say that all went well, and end without the teardown of gloo, which aborts a process now and then."""
    dist.barrier()
    print("all held", flush=True)
    os._exit(0)
