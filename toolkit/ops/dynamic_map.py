"""The dynamic 8-bit map of Dettmers et al. (2022), bitsandbytes' values: 256 whose spacing follows their magnitude."""

from functools import cache

import torch
from torch import Tensor

_DECADES = 7


@cache
def magnitudes(signed: bool) -> Tensor:
    """The values from 0 up, float32, ascending: 0, those of seven decades, 1.

    Decade i, from 10^(i - 7) to 10^(i - 6), holds the middles of 2^i equal parts (signed; else of 2^(i + 1)), so large
    values have a fine step and small ones a wide range: 129 values, or 256.
    """
    found = [torch.zeros(1)]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        found.append(10.0 ** (decade + 1 - _DECADES) * ((edges[:-1] + edges[1:]) / 2))
    return torch.cat([*found, torch.ones(1)])


@cache
def dynamic_map(signed: bool) -> Tensor:
    """All 256 values, float32, ascending, by code. Signed: with the negatives of all magnitudes but 1."""
    values = magnitudes(signed)
    return torch.cat([-values[1:-1].flip(0), values]) if signed else values


@cache
def thresholds(signed: bool) -> Tensor:
    """The middles between neighbouring magnitudes: a value takes the next one from above its threshold on."""
    values = magnitudes(signed).double()
    return ((values[1:] + values[:-1]) / 2).float()


def nearest_code(x: Tensor, signed: bool) -> Tensor:
    """uint8 codes of the nearest values; x float32 in [-1, 1] (signed) or [0, 1]. In the middle, the one nearer to 0.

    Unsigned, what is above 0 stays above 0: the root of a second moment of 0 would divide the first by epsilon alone.
    """
    count = torch.bucketize(x.abs(), thresholds(signed).to(x.device))
    if not signed:
        return torch.maximum(count, (x > 0).to(count)).to(torch.uint8)
    zero = len(magnitudes(True)) - 2
    return torch.where(x < 0, zero - count.clamp(max=zero), zero + count).to(torch.uint8)
