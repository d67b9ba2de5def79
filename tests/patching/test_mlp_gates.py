"""Gated MLPs whose gate takes two arguments: claimed when they are the registered one, refused when a limit differs."""

import pytest
import torch
from torch import nn

from toolkit.numerics import Numerics
from toolkit.patching.roles import mlp


class ClampedMlp(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.first, self.second = nn.Linear(24, 40), nn.Linear(24, 40)
        self.last = nn.Linear(40, 24, bias=False)

    def forward(self, x):
        gate, up = self.first(x).clamp(max=self.limit), self.second(x).clamp(-self.limit, self.limit)
        return self.last((up + 1) * gate * torch.sigmoid(1.702 * gate))


class Model(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.mlp = ClampedMlp(limit)

    def forward(self, x):
        return self.mlp(x)


def test_the_clamped_gate_is_found():
    (found,) = mlp.find(Model(7.0), Numerics.FAST)
    assert found.op == "gated_activation (clamped_swiglu of first)"


@pytest.mark.parametrize("limit", [6.9, 8.0, 1e9])
def test_another_limit_is_refused(limit):
    (found,) = mlp.find(Model(limit), Numerics.FAST)
    assert "it is not gated_activation" in found.reason
