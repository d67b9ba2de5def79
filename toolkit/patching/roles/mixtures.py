"""Where a model has mixtures of experts: what the roles ``experts`` and ``router`` both need to know."""

from dataclasses import dataclass

from torch import nn

from toolkit.patching.adapters import base_module, wraps_parameter


@dataclass(frozen=True)
class Mixture:
    """One layer of experts. layer: its place among them; count: of experts; siblings: the modules beside it, by path.

    stacked: whether the experts are parameters of three dimensions, or modules in a list.
    """

    path: str
    module: nn.Module
    count: int
    layer: int
    stacked: bool
    siblings: dict[str, nn.Module]


def stacked_count(module: nn.Module) -> int:
    """Experts of a module that keeps them in parameters [E, ., .]; 0 for another module."""
    counts = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
    several = sum(p.dim() == 3 for p in module.parameters(recurse=False)) > 1
    return counts.pop() if several and len(counts) == 1 else 0


def matrix_rows(module: nn.Module) -> set[int]:
    """Numbers of rows of the matrices that a module and its plain linear children have: a router's is one an expert."""
    if isinstance(module, nn.Embedding):
        return set()
    parts = [module, *(child for child in module.children() if isinstance(child, nn.Linear))]
    return {p.shape[0] for part in parts for p in part.parameters(recurse=False) if p.dim() == 2}


def _listed_count(module: nn.Module, siblings: dict[str, nn.Module]) -> int:
    """Experts in a list of modules of one class beside a matrix of as many rows; 0 for another module."""
    if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1 or len(module) < 2:
        return 0
    return len(module) if any(len(module) in matrix_rows(sibling) for sibling in siblings.values()) else 0


def mixtures(model: nn.Module) -> list[Mixture]:
    """Every layer of experts of ``model``, in the order of its modules."""
    found: list[Mixture] = []
    for parent_path, parent in model.named_modules():
        if wraps_parameter(parent):
            continue
        for name, child in parent.named_children():
            child = base_module(child)
            prefix = f"{parent_path}." if parent_path else ""
            siblings = {prefix + other: module for other, module in parent.named_children() if other != name}
            stacked = stacked_count(child)
            count = stacked or _listed_count(child, siblings)
            if count:
                found.append(Mixture(prefix + name, child, count, len(found), bool(stacked), siblings))
    return found
