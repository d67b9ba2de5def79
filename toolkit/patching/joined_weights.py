"""Weights of linear layers of one input (queries, keys, values; gate, up) placed one after another in one allocation.

Parameters stay the objects that they are, under their names; their memory alone is another. Each has a storage over its
own bytes (``toolkit.ops.joined_linear.memory``), so that state dicts, optimizers and savers find what they know.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from toolkit.modules.joined_linear import JOINED, names_of_one_input
from toolkit.numerics import Numerics
from toolkit.ops.joined_linear import lie_together, placed_together
from toolkit.patching.adapters import unwrapped
from toolkit.patching.claim import Claim, Skipped, Undo, set_attribute
from toolkit.patching.instance_forward import called_forward
from toolkit.patching.sharding import is_sharded

ROLE = "joined weights"
"""What a report calls a group of weights that were asked for and not joined."""


def joins_by_default(numerics: Numerics, device: torch.device) -> bool:
    """Whether ``patch`` joins weights unless told otherwise: fast mode, on a GPU."""
    return numerics is Numerics.FAST and device.type == "cuda"


def join_groups(model: nn.Module, claims: Sequence[Claim]) -> tuple[list[Undo], list[Skipped]]:
    """The undo steps of the groups that were joined, and the groups that were skipped, with reasons.

    One group at a time is copied, and its old memory freed. Weights that lie together already stay there.

    Args:
        model: patched.
        claims: that were installed.
    """
    groups = [(one, names) for one in claims if (names := names_of_one_input(called_forward(one.module)))]
    if is_sharded(model):
        reason = "a framework shards the parameters, and owns their memory"
        return [], [Skipped(ROLE, claim.path, reason) for claim, _ in groups]
    holders = [of for module in model.modules() for of in (module._parameters, module._buffers)]
    memory = [one for holder in holders for one in holder.values() if one is not None and _has_memory(one)]
    users = Counter(one.data_ptr() for one in memory)
    undo: list[Undo] = []
    skipped: list[Skipped] = []
    for claim, names in groups:
        layers = [unwrapped(getattr(claim.module, name)) for name in names]
        reason = _why_not(layers, users)
        if reason:
            skipped.append(Skipped(ROLE, claim.path, reason))
        elif not all(map(lie_together, _rows(layers))):
            for tensors in _rows(layers):
                for tensor, placed in zip(tensors, placed_together(tensors), strict=True):
                    tensor.data = placed
            undo += [set_attribute(claim.module, JOINED, True), partial(_separate, claim.module, names)]
    return undo, skipped


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)


def _why_not(layers: Sequence[Any], users: Counter[int]) -> str:
    """Why the layers' weights stay where they are; "" where nothing speaks against joining them."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return "a layer is no plain linear layer"
    if len({layer.bias is None for layer in layers}) > 1:
        return "some of the layers have a bias, and others none"
    for tensors in _rows(layers):
        if not all(map(_is_plain, tensors)):
            return "a weight is no plain contiguous parameter"
        if len({(one.dtype, one.device, one.shape[1:]) for one in tensors}) > 1:
            return "the weights have several dtypes, devices or input sizes"
        if any(users[one.data_ptr()] > 1 for one in tensors):
            return "a weight is shared with another module"
    return ""


def _is_plain(parameter: Any) -> bool:
    plain = type(parameter) is nn.Parameter and not parameter.is_meta and not parameter.is_inference()
    return plain and parameter.is_contiguous() and parameter.numel() > 0


def _rows(layers: Sequence[Any]) -> list[list[nn.Parameter]]:
    """The weights of the layers, and their biases where they have any."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return [[layer.weight for layer in layers], *([biases] if biases else [])]


def _separate(module: nn.Module, names: Sequence[str]) -> None:
    """Give weights that lie together memory for each."""
    layers: list[Any] = [unwrapped(getattr(module, name)) for name in names]
    if all(type(layer) is nn.Linear for layer in layers):
        for tensors in _rows(layers):
            if lie_together(tensors):
                for tensor in tensors:
                    tensor.data = tensor.detach().clone()
