"""Penalties in Triton, by marks of a row's previous tokens; and what sampling shares: ordered keys, uniforms."""

import torch
import triton
import triton.language as tl

from toolkit.ops.triton_rows import matrix

MAX_BLOCK = 4096

LOWEST = tl.constexpr(-(2**31))  # a key below all others
_NAN = tl.constexpr(2**31 - 1)  # the key of every NaN

_SEEN = tl.constexpr(1 << 30)
_SUPPRESSED = tl.constexpr(-(2**31))
_TIMES = tl.constexpr((1 << 30) - 1)


@triton.jit
def ordered(values):
    """float32 as int32 in the same order: -0 as +0, NaN above all."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values != values, _NAN, keys)


@triton.jit
def value_of(key):
    """The float32 with this int32 key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(row, columns, WIDTH: tl.constexpr):
    """The keys at ``columns`` of a row of logits, below all others outside of it."""
    inside = columns < WIDTH
    values = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, ordered(values), LOWEST)


@triton.jit
def uniform(seed, step):
    """The top 53 of the first 64 bits of Philox4x32-10, as a multiple of 2**-53 in [0, 1), float64."""
    low = step.to(tl.uint32)
    high = (step >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    bits = (first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def positions(keys):
    """Keys as int64 from 0 to 2**32 - 1, whose digits are in the order of the keys."""
    return keys.to(tl.int64) - LOWEST


@triton.jit
def mark_history(
    history, offsets, prompt_lengths, suppressed, suppressed_offsets, marks, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """A row's marks: how often a token came out, and bits for those seen and those suppressed."""
    row = tl.program_id(0).to(tl.int64)
    marks = marks + row * WIDTH
    first = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    output = first + tl.load(prompt_lengths + row)
    for start in range(first, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        token = tl.load(history + places, mask=places < end, other=-1)
        inside = (token >= 0) & (token < WIDTH)
        tl.atomic_or(marks + token, _SEEN, mask=inside)
        tl.atomic_add(marks + token, 1, mask=inside & (places >= output))
    first = tl.load(suppressed_offsets + row)
    end = tl.load(suppressed_offsets + row + 1)
    for start in range(first, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        token = tl.load(suppressed + places, mask=places < end, other=-1)
        tl.atomic_or(marks + token, _SUPPRESSED, mask=(token >= 0) & (token < WIDTH))


@triton.jit
def penalize_block(
    logits, marks, repetition, frequency, presence, result, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float64)
    mark = tl.load(marks + row * WIDTH + columns, mask=inside, other=0)
    factor = tl.load(repetition + row)
    times = mark & _TIMES
    repeated = tl.where(values > 0, values / factor, values * factor)
    values = tl.where((mark & _SEEN) != 0, repeated, values)
    penalty = tl.load(frequency + row) * times.to(tl.float64) + tl.load(presence + row)
    values = tl.where(times > 0, values - penalty, values)
    values = tl.where(mark < 0, float("-inf"), values)
    tl.store(result + row * WIDTH + columns, values.to(tl.float32), mask=inside)


def _launch(width: int) -> dict[str, int]:
    """Block and warps from the row's length alone."""
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    return {
        "WIDTH": width,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 256)),
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def penalize(
    logits: torch.Tensor,
    history: torch.Tensor,
    offsets: torch.Tensor,
    prompt_lengths: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    suppressed: torch.Tensor,
    suppressed_offsets: torch.Tensor,
) -> torch.Tensor:
    """``toolkit::penalize``: logits [B, V] in float32, bfloat16 or float16; float32 out."""
    logits = matrix("penalize", logits)
    rows, width = logits.shape
    result = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    if rows:
        marks = torch.zeros(rows, width, dtype=torch.int32, device=logits.device)
        launch = _launch(width)
        mark_history[(rows,)](
            history.contiguous(), offsets.contiguous(), prompt_lengths.contiguous(), suppressed.contiguous(),
            suppressed_offsets.contiguous(), marks, **(launch | {"BLOCK": 512, "num_warps": 4}),
        )  # fmt: skip
        launch |= {"BLOCK": min(launch["BLOCK"], 2048), "num_warps": min(launch["num_warps"], 4)}
        penalize_block[(rows, triton.cdiv(width, launch["BLOCK"]))](
            logits, marks, repetition.double().contiguous(), frequency.double().contiguous(),
            presence.double().contiguous(), result, logits.stride(0), **launch,
        )  # fmt: skip
    return result
