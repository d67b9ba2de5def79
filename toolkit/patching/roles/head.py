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
from toolkit.patching.probe import compare, device_of, generator, probe_copy, random_input, with_forward
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

    def probe() -> ProbeError:
        copied = probe_copy(module)
        hidden = random_input(2, 5, module.in_features, like=copied)
        labels = torch.randint(module.out_features, (2, 5), generator=generator(hidden.device), device=hidden.device)
        labels[1, 3:] = -100
        parameters = list(copied.parameters())
        own, ours = with_forward(copied, nn.Linear.forward), with_forward(copied, forward)

        def dense_loss(x: Tensor) -> Tensor:
            logits = own(x)[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)

        def loss(x: Tensor) -> Tensor:
            return causal_lm_loss(ours(x), labels, module.out_features)

        errors = compare(ours, own, [[hidden]], parameters), compare(loss, dense_loss, [[hidden]], parameters)
        return ProbeError(max(e.forward for e in errors), max(e.backward for e in errors))

    return [("linear_logprob" + " (fixed reduction order)" * bitwise, forward, probe)]


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
