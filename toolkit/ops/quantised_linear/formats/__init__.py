"""The formats of quantised weights, one file each, and beside it the header of its C++ functor.

A file of this folder *is* a format: its name is the file's. The value of a weight is
``((code value - zero) * scale) - offset`` in float32, each step rounded, steps that a format lacks skipped. The
file holds

``BITS``
    Bits of a code: 4 or 8.
``CODES``
    dtype of the packed codes.
``GROUPS``
    Inputs that share a scale: the sizes that the format allows; empty for the whole row.
``SCALES``
    The names of the tensors that an op takes as ``scales``, in order; a tuple for each variant.
``scale_shapes(names, outputs, groups)``
    Shape and allowed dtypes of each of them.
``values(codes, scales, outputs, group)``
    float32 [N, K] from unpacked codes [N, K] and the packed scales.
``scales_of_panels(scales, panels)``
    The scales of a weight of some panels [T] of the packed outputs; absent where every scale is [P, ...] or shared.
``quantise(weight, **options)``
    Packed codes and scales of a dense weight [N, K]; absent where a format is read and never made.
``options(scales, outputs, group)``
    The options by which ``quantise`` makes scales like these; absent where it has none.

The header of the same name holds the functor ``Format_<name>`` of the native library.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.ops.quantised_linear import packing

Packed = tuple[Tensor, list[Tensor]]
"""Codes and scales in the packed layout."""
Shapes = dict[str, tuple[list[int], tuple[torch.dtype, ...]]]


@dataclass(frozen=True)
class Format:
    """One format: see this package's docstring for the fields."""

    name: str
    bits: int
    codes: torch.dtype
    groups: tuple[int, ...]
    scales: tuple[tuple[str, ...], ...]
    scale_shapes: Callable[[Sequence[str], int, int], Shapes] = field(repr=False)
    values: Callable[[Tensor, Sequence[Tensor], int, int], Tensor] = field(repr=False)
    make: Callable[..., Packed] | None = field(repr=False)
    of_panels: Callable[[Sequence[Tensor], Tensor], list[Tensor]] = field(repr=False)
    make_options: Callable[[Sequence[Tensor], int, int], dict[str, Any]] = field(repr=False)

    def quantise(self, weight: Tensor, **options: Any) -> Packed:
        """Packed codes and scales of a dense weight [N, K].

        Raises:
            ToolkitError: the format is read only, or the weight has another number of dimensions or a NaN or infinity.
        """
        if self.make is None:
            raise ToolkitError(f"format {self.name} is read from files only; quantise to one of {', '.join(makers())}.")
        if weight.dim() != 2:
            raise ToolkitError(f"weight must have 2 dimensions, [N, K], got shape {list(weight.shape)}.")
        if not bool(weight.isfinite().all()):
            raise ToolkitError(f"weight must be finite to be quantised to {self.name}, got a NaN or an infinity.")
        return self.make(weight.detach(), **options)

    def options(self, scales: Sequence[Tensor], outputs: int, inputs: int) -> dict[str, Any]:
        """The options of ``quantise`` that make scales of this layout for a weight [outputs, inputs]."""
        return self.make_options(scales, outputs, self.group(scales, inputs))

    def group(self, scales: Sequence[Tensor], inputs: int) -> int:
        """Inputs that share a scale, from the shape of the scales. Sizes that cut K the same way are one."""
        if not self.groups:
            return max(inputs, 1)
        count = self.group_count(scales)
        for group in self.groups:
            if -(-inputs // group) == count:
                return group
        allowed = ", ".join(str(-(-inputs // group)) for group in self.groups)
        raise ToolkitError(f"{self.name}: the scales must have {allowed} groups for K = {inputs}, got {count}.")

    def group_count(self, scales: Sequence[Tensor]) -> int:
        """G, from the last tensor that has an element for each group."""
        per_group = [scale for scale in scales if scale.dim() == 3]
        return per_group[-1].shape[1] if per_group else 0

    def check(self, codes: Tensor, scales: Sequence[Tensor], outputs: int, inputs: int) -> None:
        """ToolkitError, in one sentence, for tensors that are not a weight [outputs, inputs] of this format."""
        lanes = [packing.PANEL] if self.bits == 4 else [packing.PANEL, 4]
        shape = [packing.panels(outputs), -(-inputs // packing.PER_WORD[self.bits]), *lanes]
        if list(codes.shape) != shape or codes.dtype != self.codes:
            raise ToolkitError(
                f"{self.name}: codes must be {self.codes} of shape {shape} for a weight [{outputs}, {inputs}], got"
                f" {codes.dtype} of shape {list(codes.shape)}."
            )
        counts = [len(names) for names in self.scales]
        if len(scales) not in counts:
            allowed = " or ".join(str(count) for count in counts)
            raise ToolkitError(f"{self.name}: scales must be {allowed} tensors, got {len(scales)}.")
        names = self.scales[counts.index(len(scales))]
        groups = -(-inputs // self.group(scales, inputs))
        wanted = self.scale_shapes(names, outputs, groups)
        for name, scale in zip(names, scales):
            shape, dtypes = wanted[name]
            if list(scale.shape) != shape or scale.dtype not in dtypes:
                raise ToolkitError(
                    f"{self.name}: {name} must be {' or '.join(str(dtype) for dtype in dtypes)} of shape {shape}, got"
                    f" {scale.dtype} of shape {list(scale.shape)}."
                )

    def dequantise(self, codes: Tensor, scales: Sequence[Tensor], outputs: int, inputs: int) -> Tensor:
        """float32 [outputs, inputs]."""
        self.check(codes, scales, outputs, inputs)
        unpacked = packing.unpack_codes(codes, self.bits, outputs, inputs)
        return self.values(unpacked, scales, outputs, self.group(scales, inputs))


FORMATS: Mapping[str, Format] = {}


def discover() -> dict[str, Format]:
    """The formats of this package's files, by name."""
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        found[entry.name] = Format(
            entry.name,
            module.BITS,
            module.CODES,
            module.GROUPS,
            module.SCALES,
            module.scale_shapes,
            module.values,
            getattr(module, "quantise", None),
            getattr(module, "scales_of_panels", _selected),
            getattr(module, "options", lambda *_: {}),
        )
    return dict(sorted(found.items()))


def _selected(scales: Sequence[Tensor], panels: Tensor) -> list[Tensor]:
    return [scale.index_select(0, panels) for scale in scales]


def makers() -> list[str]:
    """The formats that a dense weight can be quantised to."""
    return [name for name, one in FORMATS.items() if one.make is not None]


def find(name: str) -> Format:
    """The format of this name; ToolkitError names the nearest one otherwise."""
    if name not in FORMATS:
        raise ToolkitError(must_be_one_of("format", name, FORMATS))
    return FORMATS[name]


FORMATS = discover()
