"""nf4: 4-bit indices into the normal float values of QLoRA (Dettmers et al., 2023), blocks of 64 inputs.

The absmax of a block is its scale: float32, or quantised a second time to 8 bits: ``table[code] * nested + mean``, with
a nested absmax per 256 blocks. Blocks are counted n * G + g for output n and group g. The values are bitsandbytes'.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.dynamic_map import dynamic_map
from toolkit.ops.quantised_linear.packing import grouped, pack_codes, pack_groups, panels, spread, unpack_groups

BITS = 4
CODES = torch.int32
GROUPS = (64,)
SCALES = (("scale",), ("scale_codes", "nested_scale", "mean", "table"))
NESTED = 256  # blocks that share a nested absmax
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def scale_shapes(
    names: Sequence[str], outputs: int, groups: int
) -> dict[str, tuple[list[int], tuple[torch.dtype, ...]]]:
    shape, single = [panels(outputs), groups, 16], (torch.float32,)
    return {
        "scale": (shape, single),
        "scale_codes": (shape, (torch.uint8,)),
        "nested_scale": ([-(-outputs * groups // NESTED)], single),
        "mean": ([], single),
        "table": ([256], single),
    }


def scale_of(scales: Sequence[Tensor], outputs: int) -> Tensor:
    """float32 [N, G]: the absmax of each block."""
    if len(scales) == 1:
        return unpack_groups(scales[0], outputs)
    codes, nested, mean, table = scales
    indices = unpack_groups(codes, outputs)
    shared = nested.repeat_interleave(NESTED)[: indices.numel()].view(indices.shape)
    return table[indices.long()] * shared + mean


def scales_of_panels(scales: Sequence[Tensor], panels: Tensor) -> list[Tensor]:
    """Single-precision absmax of the blocks of these panels."""
    if len(scales) == 1:
        return [scales[0].index_select(0, panels)]
    codes, nested, mean, table = scales
    groups = codes.shape[1]
    lanes, group = (torch.arange(count, device=codes.device) for count in (16, groups))
    block = (panels[:, None, None] * 16 + lanes) * groups + group[:, None]
    # Outputs that only fill the last panel have blocks behind the last one.
    shared = nested[(block // NESTED).clamp_max(len(nested) - 1)]
    return [table[codes.index_select(0, panels).long()] * shared + mean]


def values(codes: Tensor, scales: Sequence[Tensor], outputs: int, group: int) -> Tensor:
    table = torch.tensor(VALUES, device=codes.device)
    return table[codes.long()] * spread(scale_of(scales, outputs), group, codes.shape[1])


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest value of an ascending table; the lower one of two that are equally near."""
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2)


def options(scales: Sequence[Tensor], outputs: int, group: int) -> dict[str, bool]:
    return {"double": len(scales) > 1}


def quantise(weight: Tensor, *, double: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The nearest of the values to w / absmax; ``double``: the absmax is quantised too, less its mean."""
    dense = grouped(weight, 64)
    outputs, groups, _ = dense.shape
    absmax = dense.abs().amax(2)
    inverse = (1 / absmax).where(absmax > 0, 0)
    indices = nearest((dense * inverse[..., None]).flatten(1), torch.tensor(VALUES, device=weight.device))
    codes = pack_codes(indices[:, : weight.shape[1]].to(torch.uint8), BITS)
    if not double:
        return codes, [pack_groups(absmax)]
    table = dynamic_map(signed=True).to(weight.device)
    mean = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centred = absmax.flatten() - mean
    blocks = F.pad(centred, (0, -centred.numel() % NESTED)).view(-1, NESTED)
    nested = blocks.abs().amax(1)
    chosen = nearest(blocks * (1 / nested).where(nested > 0, 0)[:, None], table)
    scale_codes = chosen.flatten()[: centred.numel()].view(outputs, groups).to(torch.uint8)
    return codes, [pack_groups(scale_codes), nested, mean, table]
