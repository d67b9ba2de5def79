"""The tables of rotary angles in Triton.

The angle is rounded to float32, as models are trained with; its cosine and sine are taken in float64, as on the
CPU: reduced to [-pi/4, pi/4] with pi/2 in parts of 29, 29 and 53 bits, then by the series of both, whose terms end
below 1e-17. That is small work beside what a model does with the tables, and needs no slow path for large angles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.triton_rows import EXACT, blocks, power_of_2


@triton.jit
def cos_sin(angle):
    """(cos, sin) of float64 angles up to 2^24: the products of their quarter turns with two parts of pi/2 are exact."""
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - turns * 1.570796325802803 - turns * 9.920935739593517e-10 - turns * 5.721188726109832e-18
    s = r * r
    sine = s * -7.647163731819816e-13 + 1.6059043836821613e-10
    sine = sine * s - 2.505210838544172e-08
    sine = sine * s + 2.7557319223985893e-06
    sine = sine * s - 0.0001984126984126984
    sine = sine * s + 0.008333333333333333
    sine = sine * s - 0.16666666666666666
    sine = sine * s * r + r
    cosine = s * 4.779477332387385e-14 - 1.1470745597729725e-11
    cosine = cosine * s + 2.08767569878681e-09
    cosine = cosine * s - 2.755731922398589e-07
    cosine = cosine * s + 2.48015873015873e-05
    cosine = cosine * s - 0.001388888888888889
    cosine = cosine * s + 0.041666666666666664
    cosine = cosine * s * s - s * 0.5 + 1.0
    quarter = turns.to(tl.int64) & 3
    odd = (quarter & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit(do_not_specialize=["rows"])
def rotary_tables_fill(
    positions, axes, inv_freq, cos, sin, rows, most, scaling,
    F: tl.constexpr, AXES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (f < F)
    frequency = tl.load(inv_freq + f, mask=f < F, other=0.0)
    if AXES:
        axis = tl.load(axes + f, mask=f < F, other=0)
        there = (axis >= 0) & (axis < most)
        position = tl.load(positions + axis * rows + row, mask=inside & there, other=0)
    else:
        position = tl.load(positions + row, mask=row < rows, other=0)
    if WIDE:
        angle = position.to(tl.float64) * frequency.to(tl.float64)
    else:
        angle = (position.to(tl.float32) * frequency.to(tl.float32)).to(tl.float64)
    if AXES:
        angle = tl.where(there, angle, float("nan"))
    c, s = cos_sin(angle)
    if not WIDE:
        c, s = c.to(tl.float32) * scaling, s.to(tl.float32) * scaling
    at = row * (2 * F) + f
    tl.store(cos + at, c.to(cos.dtype.element_ty), mask=inside)
    tl.store(cos + at + F, c.to(cos.dtype.element_ty), mask=inside)
    tl.store(sin + at, s.to(sin.dtype.element_ty), mask=inside)
    tl.store(sin + at + F, s.to(sin.dtype.element_ty), mask=inside)


def rotary_tables(
    positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype, axes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``toolkit::rotary_tables``: cos and sin, [..., 2F], in float32, bfloat16, float16 or float64."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16) or positions.dtype != torch.int64:
        raise ToolkitError(
            "rotary_tables: dtype must be one of float32, float64, bfloat16, float16 and positions int64,"
            f" got {dtype} and {positions.dtype}."
        )
    count = inv_freq.shape[0]
    shape = positions.shape if axes is None else positions.shape[1:]
    cos = torch.empty((*shape, 2 * count), dtype=dtype, device=inv_freq.device)
    sin = torch.empty((*shape, 2 * count), dtype=dtype, device=inv_freq.device)
    if cos.numel():
        rows, block = shape.numel(), min(power_of_2(count), 128)
        tile = max(1, 512 // block)
        rotary_tables_fill[(blocks(rows, tile), blocks(count, block))](
            positions.contiguous(), positions if axes is None else axes.contiguous(), inv_freq.contiguous(), cos, sin,
            rows, 1 if axes is None else positions.shape[0], 1.0 if dtype == torch.float64 else scaling,
            F=count, AXES=axes is not None, WIDE=dtype == torch.float64, ROWS=tile, BLOCK=block, num_warps=4, **EXACT,
        )  # fmt: skip
    if dtype == torch.float64:  # a number reaches a kernel as a float32
        cos, sin = cos.mul_(scaling), sin.mul_(scaling)
    return cos, sin
