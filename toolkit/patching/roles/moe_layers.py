"""Where a model has MoE layers: what the roles ``experts`` and ``router`` share."""

from dataclasses import dataclass

from torch import nn

from toolkit.patching.adapters import base_module, wraps_parameter


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
    """

    path: str
    module: nn.Module
    num_experts: int
    layer: int
    stacked: bool
    siblings: dict[str, nn.Module]


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
            count = stacked or _listed_experts(child, siblings)
            if count:
                found.append(MoeLayer(prefix + name, child, count, len(found), bool(stacked), siblings))
    return found
