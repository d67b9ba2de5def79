"""Probe copies: what a probe runs in a module's place, so that the module never changes and a probe costs little.

Slices of a linear layer, an MLP or experts are the same mathematics, so a copy keeps few entries of their dimensions.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from toolkit.patching.probe import generator
from toolkit.quantised import QuantisedWeight

KEPT = 256
"""Most output rows of a linear layer, and columns between the GEMMs of an MLP or of experts, in a copy."""


@dataclass(frozen=True)
class Slices:
    """Of which dimensions a copy keeps a part.

    Args:
        parameters: by path, (dimension, entries kept) of each dimension that is sliced.
        sizes: integer attributes of the module and its children, from the number that they are to that of the copy.
    """

    parameters: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, size: int, dimensions: Mapping[str, tuple[int, int]], kept: int = KEPT) -> "Slices":
        """``kept`` entries of a dimension of ``size``; nothing where it has no more than that.

        Args:
            dimensions: by path of a parameter, the dimension, and how many times ``size`` it is.
        """
        if size <= kept:
            return cls()
        sizes = {times * size: times * kept for _, times in dimensions.values()}
        return cls({path: ((at, times * kept),) for path, (at, times) in dimensions.items()}, {**sizes, size: kept})

    def __or__(self, other: "Slices") -> "Slices":
        paths = {**self.parameters, **other.parameters}
        merged = {path: (*self.parameters.get(path, ()), *other.parameters.get(path, ())) for path in paths}
        return Slices(merged, {**self.sizes, **other.sizes})


WHOLE = Slices()


def check_floating(module: nn.Module) -> None:
    """NotImplementedError for quantised parameters, which no probe can replace by random or float32 ones."""
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            raise NotImplementedError(
                f"parameter {name} is quantised ({str(parameter.dtype).removeprefix('torch.')}), and a probe needs "
                "random weights"
            )


def probe_copy(
    module: nn.Module, slices: Slices = WHOLE, own_values: bool = False, dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """A copy in eval mode whose parameters need gradients. Nothing but its parameters is ever allocated.

    Args:
        slices: what of it is copied.
        own_values: keep the module's numbers, dequantised; else parameters are random, of unit scale (matrices:
            1/sqrt(fan in)).
        dtype: of floating-point parameters and buffers; None is each one's own.
    """
    check_floating(module)
    memo: dict[int, object] = {}
    for stream, (path, parameter) in enumerate(module.named_parameters()):
        # A stream each: with equal weights, queries could not be told from keys, nor gate from up.
        kept = slices.parameters.get(path, ())
        made = _own(parameter, kept, dtype) if own_values else _random(parameter, kept, dtype, 1000 + stream)
        memo[id(parameter)] = made.requires_grad_(True)
    copied = copy.deepcopy(module, memo).eval()
    if dtype is not None:
        copied.to(dtype)  # buffers: the parameters are
    for part in copied.modules():
        for name, value in list(part.__dict__.items()):
            if type(value) is int and value in slices.sizes and name != "layer_idx":
                part.__dict__[name] = slices.sizes[value]
    return copied


def _own(parameter: Tensor, kept: tuple[tuple[int, int], ...], dtype: torch.dtype | None) -> nn.Parameter:
    values = parameter.dequantise() if isinstance(parameter, QuantisedWeight) else parameter.detach()
    # The dimension that loses most is the first: whole experts, copied on the way, are a gibibyte at Mixtral's width.
    for dimension, count in sorted(kept, key=lambda one: one[1] / values.shape[one[0]]):
        if count < values.shape[dimension]:
            # Evenly spread: of both halves where gate and up are one matrix.
            at = torch.linspace(0, values.shape[dimension] - 1, count, dtype=torch.float64).round().long()
            values = values.index_select(dimension, at.to(values.device))
    return nn.Parameter(values.to(dtype or values.dtype, copy=True))


def _random(
    parameter: Tensor, kept: tuple[tuple[int, int], ...], dtype: torch.dtype | None, stream: int
) -> nn.Parameter:
    shape = list(parameter.shape)
    for dimension, count in kept:
        shape[dimension] = min(count, shape[dimension])
    made = nn.Parameter(torch.empty(shape, dtype=dtype or parameter.dtype, device=parameter.device))
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
    with torch.no_grad():
        return made.normal_(0.0, scale, generator=generator(parameter.device, stream))  # type: ignore[return-value]
