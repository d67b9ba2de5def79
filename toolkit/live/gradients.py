"""One forward and backward of micro-batches of several tenants, each under its own adapter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from toolkit.live.examples import MicroBatch
from toolkit.live.losses import Loss
from toolkit.patching import target_logprobs


@dataclass(frozen=True)
class Part:
    """A tenant's micro-batch in a batch.

    Args:
        adapter: its name in the model; None where the model's own weights are trained.
        parameters: of the adapter, or of the model.
        micro_batch: the tenant's.
        loss: of each of its examples.
        config: of the loss.
        backward: whether gradients are wanted.
    """

    adapter: str | None
    parameters: Mapping[str, nn.Parameter]
    micro_batch: MicroBatch
    loss: Loss
    config: Mapping[str, float]
    backward: bool


@dataclass(frozen=True)
class Outcome:
    """What a micro-batch gave.

    Args:
        logprobs: [n] float32 of the targets of each example, on the CPU.
        losses: of each example.
        gradients: of the sum of the losses, by parameter; none without a backward.
    """

    logprobs: list[Tensor]
    losses: list[float]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def run_parts(
    model: nn.Module, parts: Sequence[Part], after_rows: Callable[[Tensor], None] | None = None
) -> list[Outcome]:
    """What each part gives, bitwise what it gives alone: rows are batch-invariant and gradients are one adapter's.

    No graph outlives the call, and nothing is written.

    Args:
        model: patched, with the adapters.
        parts: of distinct tenants; one alone where its micro-batch shares prefixes.
        after_rows: of ``target_logprobs``.
    """
    leaves = [parameter for part in parts if part.backward for parameter in part.parameters.values()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    try:
        with torch.set_grad_enabled(bool(leaves)):
            return _run(model, parts, leaves, after_rows)
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


def _run(
    model: nn.Module,
    parts: Sequence[Part],
    leaves: Sequence[nn.Parameter],
    after_rows: Callable[[Tensor], None] | None,
) -> list[Outcome]:
    examples = [one for part in parts for one in part.micro_batch.examples]
    found = target_logprobs(
        model,
        [one.tokens for one in examples],
        [one.targets for one in examples],
        adapters=[part.adapter for part in parts for _ in part.micro_batch.examples],
        share=any(part.micro_batch.shares for part in parts),
        after_rows=after_rows,
    )
    rows = iter(found)
    outcomes, total = [], torch.zeros((), device=found[0].device)
    for part in parts:
        logprobs, losses = [], []
        for example in part.micro_batch.examples:
            row = next(rows)
            inputs = {name: values.to(row.device) for name, values in example.inputs.items()}
            loss = part.loss.function(row, inputs, part.config)
            logprobs.append(row.detach().float().cpu())
            losses.append(float(loss.detach()))
            if part.backward:
                total = total + loss
        outcomes.append(Outcome(logprobs, losses))
    if leaves:
        # A projection that no example reaches has no gradient.
        gradients = iter(torch.autograd.grad(total, leaves, allow_unused=True))
        for part, outcome in zip(parts, outcomes):
            if part.backward:
                for name, parameter in part.parameters.items():
                    one = next(gradients)
                    outcome.gradients[name] = torch.zeros_like(parameter) if one is None else one
    return outcomes
