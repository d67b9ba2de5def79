"""The model's own forward up to its text part: features of items, and what a sequence's media make of it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.elementwise import row_invariant
from toolkit.numerics import Numerics
from toolkit.patching.multimodal.entry import Arrival, MediaEntry, arriving
from toolkit.patching.multimodal.items import Item
from toolkit.patching.probe import device_of
from toolkit.patching.record import report_of
from toolkit.patching.sharding import check_unsharded, check_unsplit
from toolkit.patching.without_media import asks_for_media
from toolkit.state.media import Features


@contextmanager
def numerics_of(model: nn.Module) -> Iterator[None]:
    """Inside, functions between modules are batch-invariant where the patch promises bits."""
    report = report_of(model)
    bitwise = report is not None and report.numerics is Numerics.BITWISE and device_of(model).type == "cpu"
    with row_invariant() if bitwise and not torch.compiler.is_compiling() else nullcontext():
        yield


def on_device(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors where the model is; the others as they are."""
    device = device_of(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def taken_by(forward: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that ``forward`` takes."""
    parameters = inspect.signature(forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def encode_item(model: nn.Module, entry: MediaEntry, item: Item) -> Features:
    """The features of one item, alone: what the model's own forward puts in the place of its placeholders.

    With gradients on they have their graph, through tower and projector.

    Raises:
        ToolkitError: the model's parameters are sharded, or its forward did not reach its text part.
    """
    check_unsharded(model, "encoding images")
    check_unsplit(model, "encoding images")
    rows = torch.arange(item.tokens, device=device_of(model))
    arguments = {
        "input_ids": torch.full_like(rows, item.placeholder)[None],
        "attention_mask": torch.ones_like(rows)[None],
        # A forward that asks for an image may hand its keywords to the tower too, whose positions these are not.
        **({} if asks_for_media(model) else {"position_ids": rows[None]}),
        "use_cache": False,
        **on_device(model, item.arguments),
        **on_device(model, item.token_arguments),
    }
    with numerics_of(model), arriving(model, stop=True) as arrival:
        model(**taken_by(type(model).forward, arguments))
    return features_at(entry, arrival, rows)


def features_at(entry: MediaEntry, arrival: Arrival, rows: Tensor) -> Features:
    """Of the rows [n] of the one sequence that arrived at the entry."""
    if not arrival.arguments:
        raise ToolkitError("a forward with images must reach the model's text part, got none that did.")
    return entry.features(arrival.arguments, rows)
