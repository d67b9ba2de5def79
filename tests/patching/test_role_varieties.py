"""Norms, rotary tables and gated MLPs in the forms that models differ in: each found, and a near miss skipped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, Skipped
from toolkit.patching.roles import activation, mlp, norm, rotary


class Rms(nn.Module):
    """No weight, and no say in the width."""

    def __init__(self, outside: bool = False) -> None:
        super().__init__()
        self.eps, self.outside = 1e-6, outside

    def forward(self, x):
        mean = x.pow(2).mean(-1, keepdim=True)
        return x / (mean.sqrt() + self.eps) if self.outside else x * torch.pow(mean + self.eps, -0.5)


class PlainLayerNorm(nn.Module):
    """No parameters, and an epsilon that only its code knows."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.normalized_shape, self.size = (24,), eps * 1e6

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, None, None, self.size * 1e-6)


class OffsetLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Packed(nn.Module):
    """Gate and up in one projection."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.into, self.back, self.layout = nn.Linear(24, 80), nn.Linear(40, 24, bias=False), layout

    def forward(self, x):
        packed = self.into(x)
        gate, up = (packed[..., 0::2], packed[..., 1::2]) if "columns" in self.layout else packed.chunk(2, -1)
        if "swapped" in self.layout:
            gate, up = up, gate
        return self.back(F.silu(gate) * up * (1.01 if "scaled" in self.layout else 1.0))


class AnyTables(nn.Module):
    """Rotary tables: a layout of the frequencies, for one layer type or two, along one axis or three."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        frequencies = 1e4 ** -(torch.arange(6) / 6)
        kinds = ["near_inv_freq", "far_inv_freq", "far_original_inv_freq"] if "kinds" in layout else ["inv_freq"]
        for count, name in enumerate(kinds, 1):
            self.register_buffer(name, frequencies / count)
        self.far_attention_scaling = 0.7

    def table(self, angles, scaling=1.0):
        if "complex" in self.layout:
            return torch.polar(torch.ones_like(angles), angles)
        if "repeated" in self.layout:
            angles = angles.repeat_interleave(2, -1)
        elif "once" not in self.layout:
            angles = torch.cat((angles, angles), -1)
        if "late" in self.layout:
            angles = angles + 0.01
        return angles.cos() * scaling, angles.sin() * scaling


def in_type_of(x, tables):
    """Cosines and sines in the type of hidden states, as most models have them; complex numbers as they are."""
    return tables if isinstance(tables, torch.Tensor) else tuple(one.to(x.dtype) for one in tables)


class OneKind(AnyTables):
    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq
        if "axes" in self.layout:
            angles = angles.expand(3, -1, -1, -1)
            axes = torch.tensor([0, 1, 2, 0, 1, 0]) if "turns" in self.layout else torch.tensor([0, 0, 1, 1, 2, 2])
            angles = torch.stack([angles[axis, ..., f] for f, axis in enumerate(axes)], -1)
        return in_type_of(x, self.table(angles)) if "wide" not in self.layout else self.table(angles)


class TwoKinds(AnyTables):
    def forward(self, x, position_ids, layer_type):
        angles = position_ids[..., None].float() * getattr(self, f"{layer_type}_inv_freq")
        return in_type_of(x, self.table(angles, getattr(self, f"{layer_type}_attention_scaling", 1.0)))


def found(role, module: nn.Module) -> Claim | Skipped:
    model = nn.ModuleList([module])
    (one,) = role.find(model, Numerics.BITWISE)
    return one


@pytest.mark.parametrize(
    ("role", "module", "op"),
    [
        (norm, Rms(), "rms_norm"),
        (norm, PlainLayerNorm(), "layer_norm"),
        (norm, OffsetLayerNorm(24), "layer_norm (1 + weight)"),
        (mlp, Packed("halves"), "gated_activation (silu of the first half of into)"),
        (mlp, Packed("halves swapped"), "gated_activation (silu of the second half of into)"),
        (mlp, Packed("columns"), "gated_activation (silu of the even half of into)"),
        (mlp, Packed("columns swapped"), "gated_activation (silu of the odd half of into)"),
        (rotary, OneKind("twice"), "rotary_tables"),
        (rotary, OneKind("repeated"), "rotary_tables (repeated)"),
        (rotary, OneKind("once"), "rotary_tables (once)"),
        (rotary, OneKind("twice, wide"), "rotary_tables in float32"),
        (rotary, OneKind("once, wide"), "rotary_tables (once) in float32"),
        (rotary, OneKind("complex"), "rotary_tables (complex)"),
        (rotary, OneKind("axes, sections"), "rotary_tables along axes"),
        (rotary, OneKind("axes, in turns"), "rotary_tables along axes"),
        (rotary, TwoKinds("kinds"), "rotary_tables"),
        (rotary, TwoKinds("kinds, repeated"), "rotary_tables (repeated)"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "layout", type(value).__name__),
)
def test_a_variety_is_found(role, module, op):
    one = found(role, module)
    assert isinstance(one, Claim), one
    assert one.op == op


@pytest.mark.parametrize(
    ("role", "module"),
    [
        (norm, Rms(outside=True)),
        (norm, PlainLayerNorm(3e-5)),
        (mlp, Packed("halves scaled")),
        (rotary, OneKind("twice, late")),
        (rotary, OneKind("axes, late")),
        (rotary, TwoKinds("kinds, late")),
    ],
    ids=lambda value: getattr(value, "layout", type(value).__name__),
)
def test_a_near_miss_is_skipped(role, module):
    one = found(role, module)
    assert isinstance(one, Skipped)
    assert "probe error" in one.reason


@pytest.mark.parametrize("layout", ["axes, sections", "axes, in turns"])
def test_tables_along_axes_are_those_of_the_module(layout):
    module = OneKind(layout)
    one = found(rotary, module)
    positions = torch.randint(0, 5000, (3, 2, 7), generator=torch.Generator().manual_seed(1))
    expected = module.double()(torch.zeros((), dtype=torch.float64), positions.double())
    module.float()
    one.install()
    for got, wanted in zip(module(torch.zeros(()), positions), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=5e-4)  # of angles to 5,000 in float32
    plain = module(torch.zeros(()), positions[0])
    same = module(torch.zeros(()), positions[:1].expand(3, -1, -1))
    assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True))


@pytest.mark.parametrize("module", [Rms(), nn.AvgPool2d(2), nn.Softmax(-1)])
def test_what_is_not_elementwise_is_no_activation(module):
    assert activation.find(nn.ModuleList([module]), Numerics.BITWISE) == []
