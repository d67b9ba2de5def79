"""The head: the output projection, whose logits may be deferred, and the causal language-modelling loss."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.modules.head import causal_lm_loss, head_forward
from toolkit.modules.linear import autocast_linear
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, ProbeError, Skipped, set_attribute
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import compare, device_of, generator, random_input
from toolkit.patching.probe_copy import KEPT, Slices
from toolkit.patching.search import Candidate, search
from toolkit.patching.sharding import is_sharded


def _probe_loss(model: Any) -> ProbeError:
    original, vocabulary, device = model.loss_function, 37, device_of(model)
    labels = torch.randint(vocabulary, (2, 6), generator=generator(device), device=device)
    labels[0, 4:] = -100
    logits = random_input(2, 6, vocabulary, like=model, scale=3.0)
    errors = []
    variants: tuple[dict[str, Any], ...] = ({}, {"num_items_in_batch": 7}, {"shift_labels": labels.roll(-1, 1)})
    for settings in variants:

        def loss(function: Callable[..., Tensor], settings: dict[str, Any] = settings) -> Callable[[Tensor], Tensor]:
            def run(values: Tensor) -> Tensor:
                return function(logits=values, labels=labels, vocab_size=vocabulary, **settings)

            return run

        errors.append(compare(loss(causal_lm_loss), loss(original), [[logits]]))
    return ProbeError(max(e.forward for e in errors), max(e.backward for e in errors))


def _candidates(module: nn.Module, model: nn.Module, numerics: Numerics) -> list[Candidate] | None:
    """The one candidate of a plain ``nn.Linear``: its logits are deferred while gradients are on."""
    if type(module) is not nn.Linear:
        return None
    bitwise = numerics is Numerics.BITWISE
    owner = weakref.ref(model)  # a forward must not keep its model alive
    forward = head_forward(autocast_linear if bitwise else F.linear, bitwise, lambda: is_sharded(owner()))

    return [("linear_logprob" + " (fixed reduction order)" * bitwise, forward, partial(_probe, module, forward))]


def _probe(module: nn.Linear, forward: Callable[..., Any]) -> ProbeError:
    """Logits, and the loss taken from deferred ones, on a few rows of the vocabulary."""
    vocabulary = min(module.out_features, KEPT)
    slices = Slices.of(module.out_features, {"weight": (0, 1), "bias": (0, 1)})

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        hidden = random_input(2, 5, module.in_features, like=copied)
        labels = torch.randint(vocabulary, (2, 5), generator=generator(hidden.device), device=hidden.device)
        labels[1, 3:] = -100
        return [[hidden, labels]]

    def logits(self: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        computed: Tensor = forward(self, x)
        return computed

    def own_logits(self: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
        return nn.Linear.forward(self, x)

    def loss(self: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return causal_lm_loss(forward(self, x), labels, vocabulary)

    def own_loss(self: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
        dense = nn.Linear.forward(self, x)[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(dense, labels[:, 1:].flatten(), ignore_index=-100)

    error = error_of(module, logits, batches, own_logits, slices)
    return error.worse(error_of(module, loss, batches, own_loss, slices)) if error.passes() else error


def find(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on the output projection, and one on the model's loss function."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        return []
    found = search(model, "head", lambda module: _candidates(module, model, numerics) if module is output else None)
    if not found:
        path = next(name for name, module in model.named_modules() if module is output)
        found.append(Skipped("head", path, f"its class must be nn.Linear, got {type(output).__name__}"))
    try:
        error = _probe_loss(model)
    except Exception as problem:
        return [*found, Skipped("head", "", f"its loss cannot be probed: {type(problem).__name__}")]
    if error.passes():
        install = partial(set_attribute, model, "_loss_function", causal_lm_loss)
        return [*found, Claim("head", "", model, "causal_lm_loss", error, install)]
    return [*found, Skipped("head", "", f"its loss is not causal_lm_loss: probe error {error.worst():.1e}")]
