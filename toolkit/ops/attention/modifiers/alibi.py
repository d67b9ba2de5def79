"""alibi: s + slope (key - query), with the head's slope as parameter (Press, Smith and Lewis, 2022)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl


def score(s: Tensor, query: Tensor, key: Tensor, slope: Tensor) -> Tensor:
    return s + slope * (key - query)


def derivative(s: Tensor, query: Tensor, key: Tensor, slope: Tensor) -> Tensor:
    return torch.ones_like(s)


def triton_score(s, query, key, p):
    return s + tl.load(p) * (key - query).to(tl.float32)


def triton_both(s, query, key, p):
    return s + tl.load(p) * (key - query).to(tl.float32), 1.0
