"""Where a model has MoE layers: what the roles ``experts`` and ``router`` share."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolkit.patching.adapters import base_module, wraps_parameter
from toolkit.patching.probe import generator, random_input

FEW = 5
"""Experts of a probe copy: the hundreds of a layer compute the same function."""
_TOP_K = 2
# The largest drives gates into their tails, past the limits at which some of them are clamped.
_SCALES = (1.0, 4.0, 16.0)
_MARGIN = 0.03  # between the logits of the last expert that is selected and the next, relative


@dataclass(frozen=True)
class MoeLayer:
    """One module of experts in a model.

    Args:
        path: the module's name in the model.
        module: the module of experts.
        num_experts: E.
        layer: the index among the model's MoE layers.
        stacked: whether the experts are parameters [E, ., .], or modules in a list.
        siblings: the modules beside it, by path.
        flat: whether the experts are three matrices [E F, H] of a child.
    """

    path: str
    module: nn.Module
    num_experts: int
    layer: int
    stacked: bool
    siblings: dict[str, nn.Module]
    flat: bool = False


def stacked_experts(module: nn.Module) -> int:
    """The number of experts of a module that keeps them in parameters [E, ., .]; 0 for another module."""
    counts = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
    several = sum(p.dim() == 3 for p in module.parameters(recurse=False)) > 1
    return counts.pop() if several and len(counts) == 1 else 0


def matrix_rows(module: nn.Module) -> set[int]:
    """The numbers of rows of the matrices of a module and its plain linear children: a router's has one per expert."""
    if isinstance(module, nn.Embedding):
        return set()
    parts = [module, *(child for child in module.children() if isinstance(child, nn.Linear))]
    return {p.shape[0] for part in parts for p in part.parameters(recurse=False) if p.dim() == 2}


def _listed_experts(module: nn.Module, siblings: dict[str, nn.Module]) -> int:
    """The number of experts in a list of modules of one class beside a matrix of as many rows; 0 for another module."""
    if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1 or len(module) < 2:
        return 0
    return len(module) if any(len(module) in matrix_rows(sibling) for sibling in siblings.values()) else 0


def _flat_experts(module: nn.Module, siblings: dict[str, nn.Module]) -> int:
    """The number of experts of a module that hands ids and weights to matrices [E F, H]; 0 for another module."""
    count, own = getattr(module, "num_experts", None), list(module.parameters())
    if type(count) is not int or len(own) != 3 or len({p.shape for p in own}) != 1 or own[0].dim() != 2:
        return 0
    takes = len(inspect.signature(type(module).forward).parameters) - 1  # without self
    fits = takes == 3 and count > 0 and own[0].shape[0] % count == 0 and own[0].shape[0] > count
    return count if fits and any(count in matrix_rows(sibling) for sibling in siblings.values()) else 0


def expert_batches(copied: nn.Module, kept: int, width: int) -> list[list[Tensor]]:
    """Hidden states [T, H], ids and weights [T, K] for a copy of experts, of which ``kept`` are chosen from."""
    device, found = next(copied.parameters()).device, []
    for stream, scale in enumerate(_SCALES):
        # A token's experts are distinct; some experts get no token.
        order = torch.rand(6, kept, generator=generator(device, 1 + stream), device=device).argsort(-1)
        topk_ids = order[:, : min(_TOP_K, kept)]
        topk_weights = torch.rand(topk_ids.shape, generator=generator(device, 11 + stream), device=device) + 0.1
        found.append([random_input(6, width, like=copied, scale=scale), topk_ids, topk_weights])
    return found


def clear_choice(x: Tensor, weight: Tensor, top_k: int) -> Tensor:
    """[T] whether rounding to 16 bits cannot send a token to other experts: those tokens tell a probe nothing.

    Args:
        x: [T, H].
        weight: [E, H], of the logits; the ``top_k`` largest are selected.
    """
    logits = x @ weight.detach().float().T
    best = logits.sort(-1, descending=True).values
    if top_k == best.shape[-1]:
        return best[:, 0] == best[:, 0]
    return best[:, top_k - 1] - best[:, top_k] >= _MARGIN * best[:, : top_k + 1].abs().amax(-1)


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Every MoE layer of ``model``, in module order."""
    found: list[MoeLayer] = []
    for parent_path, parent in model.named_modules():
        if wraps_parameter(parent):
            continue
        for name, child in parent.named_children():
            child = base_module(child)
            prefix = f"{parent_path}." if parent_path else ""
            siblings = {prefix + other: module for other, module in parent.named_children() if other != name}
            stacked = stacked_experts(child)
            flat = 0 if stacked else _flat_experts(child, siblings)
            count = stacked or flat or _listed_experts(child, siblings)
            if count:
                found.append(MoeLayer(prefix + name, child, count, len(found), bool(stacked), siblings, bool(flat)))
    return found
