"""How a model is called with a ragged batch: what its forward takes, and masks that say nothing."""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface

from toolkit.patching.report import PatchReport
from toolkit.state.active import KEYWORD, get_forward_context
from toolkit.state.context import ForwardContext

MASKS_OF_BATCH = "masks of the batch"
"""What a report calls the claim on a model whose masks ``register_masks`` makes in a ragged batch."""


def call_arguments(model: nn.Module, report: PatchReport, context: ForwardContext) -> dict[str, Any]:
    """What the model's forward takes beside tokens: positions, a mask, the context. Others reach it as the thread's."""
    batch = context.batch
    # Positions [1, T], or [A, 1, T] along axes; where the model counts from another number than 0, from that one.
    offset = report.ragged.position_offset
    positions = batch.positions + offset if offset else batch.positions
    arguments = {"position_ids": positions.unsqueeze(-2), "use_cache": False, KEYWORD: context}
    if not report.ragged.makes_masks and not any(claim.op == MASKS_OF_BATCH for claim in report.claims):
        # Without entries and 4-D: transformers builds no mask for it, and attention reads the batch instead.
        arguments["attention_mask"] = torch.empty(1, 1, 0, 0, device=batch.positions.device)
    return {name: value for name, value in arguments.items() if takes(type(model).forward, name)}


def hidden_part(model: Any) -> str:
    """The path of the part of a model that computes the last hidden states; "" for a model without a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


@cache
def takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a forward can be called with the keyword ``name``."""
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _by_context(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make_mask)
    def mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> Any:
        if get_forward_context() is None:
            return make_mask(batch_size, q_length, kv_length, *args, **kwargs)
        # Who sees whom is the context's: layers expect a mask of this shape, and nothing reads it.
        nothing: Tensor = torch.zeros((), dtype=torch.bool, device=kwargs.get("device"))
        return nothing.expand(batch_size, 1, q_length, kv_length)

    mask.toolkit_by_context = True  # type: ignore[attr-defined]
    return mask


def register_masks() -> None:
    """Let transformers' mask functions make no masks in the forward over a ragged batch; other calls are as before.

    For layers whose code needs a mask of the usual shape, although the context of the batch stands in for it.
    """
    functions: dict[str, Any] = dict(AttentionMaskInterface._global_mapping)
    for name, make_mask in functions.items():
        own = getattr(make_mask, "__module__", "").startswith("transformers.")
        if own and not hasattr(make_mask, "toolkit_by_context"):
            AttentionMaskInterface.register(name, _by_context(make_mask))
