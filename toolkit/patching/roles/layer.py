"""Decoder layers, which activation checkpointing recomputes in the backward, outside the model's forward.

The recomputation must equal the first run: over the same ragged batch, although some models drop the keyword that
passes it, in bitwise mode with the elementwise functions of ``row_invariant``, and with attention weights where the
first run returned them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.elementwise import row_invariant
from toolkit.numerics import Numerics
from toolkit.patching.attention_interface import weights_recomputed, weights_wanted
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward
from toolkit.patching.probe import device_of
from toolkit.state.active import forward_context_of, set_forward_context


def recomputable(forward: Callable[..., Any], batch_invariant: bool) -> Callable[..., Any]:
    """``forward``, which runs in the ragged batch of its input, in a recomputation too.

    Args:
        batch_invariant: run the layer's elementwise functions inside ``row_invariant``.
    """
    # transformers checkpoints inside the class's forward; earlier versions around the module's call, where the input
    # carries the batch.
    own = getattr(forward, "__wrapped__", None) if "checkpointing" in forward.__code__.co_name else None

    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        hidden = args[0] if args else kwargs.get("hidden_states")
        context, wanted = forward_context_of(kwargs), weights_wanted()
        if context is None and torch._C._current_graph_task_id() != -1:  # in a backward
            context, wanted = getattr(hidden, "toolkit_first_run", (None, False))
        if context is None and not wanted:
            return forward(self, *args, **kwargs)

        def run(*inputs: Any) -> Any:
            batch = nullcontext() if context is None else set_forward_context(context)
            invariant = row_invariant() if batch_invariant and context is not None else nullcontext()
            with batch, invariant, weights_recomputed(wanted):
                return (own or forward)(self, *inputs, **kwargs)

        if own is None:
            if torch.is_grad_enabled() and isinstance(hidden, Tensor):
                hidden.toolkit_first_run = context, wanted  # type: ignore[attr-defined]
        elif self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(run, *args)  # type: ignore[operator]
        return run(*args)

    return replaced


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on every layer that can be checkpointed. It computes what it did before, so there is no probe."""
    batch_invariant = numerics is Numerics.BITWISE and device_of(model).type == "cpu"
    return [
        Claim(
            "layer", path, module, "its own forward, in its ragged batch", ProbeError(0.0, 0.0),
            replace_forward(module, recomputable(type(module).forward, batch_invariant)),
        )
        for path, module in model.named_modules()
        if hasattr(type(module), "gradient_checkpointing")
    ]  # fmt: skip
