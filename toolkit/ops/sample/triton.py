"""Sampling in Triton: one program a row, which walks the vocabulary in blocks of a width set by its length alone.

Thresholds of top-k and top-p are searched on the ordered bits of the logits: a pass counts or weighs what reaches each
of three keys, two bits of the threshold, and the search ends as soon as the set of tokens is settled. In a pass every
lane adds up its own, and the lanes are added once at its end. Weights are float64, kept in a scratch row. All sums have
one order; a row's bits depend on that row alone. Floating-point contraction is off.
"""

import torch
import triton
import triton.language as tl

from toolkit.ops.sample.reference import LEAST_MASS
from toolkit.ops.triton_rows import matrix

MAX_BLOCK = 4096

_LOWEST = tl.constexpr(-(2**31))
_NAN = tl.constexpr(2**31 - 1)  # the key of every NaN
_NO_CHANCE = tl.constexpr(-2139095041)  # the key of -inf

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
    return tl.where(inside, ordered(values), _LOWEST)


@triton.jit
def uniform(seed, step):
    """The top 53 of the first 64 bits of Philox4x32-10, as a multiple of 2**-53 in [0, 1), float64."""
    low = step.to(tl.uint32)
    high = (step >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    bits = (first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def quarters(low, high):
    """Three keys, as int32, that cut ``low`` ... ``high`` in four parts, as far as there are so many; the later ones
    may be ``high``, which is at most one above a finite number's."""
    step = tl.maximum((high - low) >> 2, 1)
    first, second, third = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
    return first.to(tl.int32), second.to(tl.int32), third.to(tl.int32)


@triton.jit
def chosen(in_1, in_2, in_3, none, first, second, third):
    """Of keys 1, 2, 3, ascending, the value of the last one that is in, or ``none``; in the type of that."""
    return tl.where(in_3, third, tl.where(in_2, second, tl.where(in_1, first, none)))


@triton.jit
def top_k_edge(row, best, k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A key that the k largest of a row reach, and what equals the k-th, and no others."""
    low = tl.full([], _NO_CHANCE, tl.int64)  # at least k reach it, ``count`` of them
    high = best.to(tl.int64) + 1  # fewer reach it
    count = tl.full([], WIDTH, tl.int64)
    while (high - low > 1) & (count != k):
        key_1, key_2, key_3 = quarters(low, high)
        lanes_1 = tl.zeros([BLOCK], tl.int32)
        lanes_2 = tl.zeros([BLOCK], tl.int32)
        lanes_3 = tl.zeros([BLOCK], tl.int32)
        for start in range(0, WIDTH, BLOCK):
            keys = keys_of(row, start + tl.arange(0, BLOCK), WIDTH)
            lanes_1 += (keys >= key_1).to(tl.int32)
            lanes_2 += (keys >= key_2).to(tl.int32)
            lanes_3 += (keys >= key_3).to(tl.int32)
        reach_1 = tl.sum(lanes_1, 0).to(tl.int64)
        reach_2 = tl.sum(lanes_2, 0).to(tl.int64)
        reach_3 = tl.sum(lanes_3, 0).to(tl.int64)
        in_1, in_2, in_3 = reach_1 >= k, reach_2 >= k, reach_3 >= k
        high = chosen(in_1, in_2, in_3, key_1, key_2, key_3, high)
        low = chosen(in_1, in_2, in_3, low, key_1, key_2, key_3)
        count = chosen(in_1, in_2, in_3, count, reach_1, reach_2, reach_3)
    return low


@triton.jit
def nucleus_edge(row, weights, least, best, target, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(low, high, mass): keys from high up are in and weigh ``mass``, short of ``target``. Those from low to below
    high are one token, or equals; with them the target is reached."""
    low = least
    high = best.to(tl.int64) + 1
    reach_low = tl.full([], WIDTH, tl.int64)
    reach_high = tl.full([], 0, tl.int64)
    mass_high = tl.full([], 0.0, tl.float64)
    while (high - low > 1) & (reach_low - reach_high > 1):
        key_1, key_2, key_3 = quarters(low, high)
        lanes_1 = tl.zeros([BLOCK], tl.int32)
        lanes_2 = tl.zeros([BLOCK], tl.int32)
        lanes_3 = tl.zeros([BLOCK], tl.int32)
        masses_1 = tl.zeros([BLOCK], tl.float64)
        masses_2 = tl.zeros([BLOCK], tl.float64)
        masses_3 = tl.zeros([BLOCK], tl.float64)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keys = keys_of(row, columns, WIDTH)
            weight = tl.load(weights + columns, mask=columns < WIDTH, other=0.0)
            lanes_1 += (keys >= key_1).to(tl.int32)
            lanes_2 += (keys >= key_2).to(tl.int32)
            lanes_3 += (keys >= key_3).to(tl.int32)
            masses_1 += tl.where(keys >= key_1, weight, 0.0)
            masses_2 += tl.where(keys >= key_2, weight, 0.0)
            masses_3 += tl.where(keys >= key_3, weight, 0.0)
        reach_1 = tl.sum(lanes_1, 0).to(tl.int64)
        reach_2 = tl.sum(lanes_2, 0).to(tl.int64)
        reach_3 = tl.sum(lanes_3, 0).to(tl.int64)
        mass_1, mass_2, mass_3 = tl.sum(masses_1, 0), tl.sum(masses_2, 0), tl.sum(masses_3, 0)
        in_1, in_2, in_3 = mass_1 >= target, mass_2 >= target, mass_3 >= target
        high = chosen(in_1, in_2, in_3, key_1, key_2, key_3, high)
        low = chosen(in_1, in_2, in_3, low, key_1, key_2, key_3)
        reach_high = chosen(in_1, in_2, in_3, reach_1, reach_2, reach_3, reach_high)
        mass_high = chosen(in_1, in_2, in_3, mass_1, mass_2, mass_3, mass_high)
        reach_low = chosen(in_1, in_2, in_3, reach_low, reach_1, reach_2, reach_3)
    return low, high, mass_high


@triton.jit
def sample_row(
    logits, temperature, top_k, top_p, min_p, seeds, steps, weights, tokens, logprobs, stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * stride
    weights = weights + at * WIDTH
    largest = tl.full([BLOCK], _LOWEST, tl.int32)  # of each lane, and the first column that has it
    first_column = tl.full([BLOCK], WIDTH, tl.int32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keys = keys_of(row, columns, WIDTH)
        first_column = tl.where(keys > largest, columns, first_column)
        largest = tl.maximum(largest, keys)
    best = tl.max(largest, 0)
    best_id = tl.min(tl.where(largest == best, first_column, WIDTH), 0)
    heat = tl.load(temperature + at)
    hot = heat > 0
    heat = tl.where(hot, heat, 1.0)
    top = value_of(best).to(tl.float64) / heat
    proper = top - top == 0  # neither infinite nor NaN
    if hot & proper:
        least = tl.full([], _NO_CHANCE, tl.int64)
        k = tl.load(top_k + at)
        if (k > 0) & (k < WIDTH):
            least = top_k_edge(row, best, k, WIDTH, BLOCK)
        total = tl.full([], 0.0, tl.float64)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keys = keys_of(row, columns, WIDTH)
            weight = tl.exp(value_of(keys).to(tl.float64) / heat - top)
            weight = tl.where(keys >= least, weight, 0.0)
            tl.store(weights + columns, weight, mask=columns < WIDTH)
            total += tl.sum(weight, 0)
        tl.debug_barrier()  # weights are read back by other threads than wrote them
        low = least
        high = best.to(tl.int64) + 1
        room = tl.full([], WIDTH, tl.int64)
        share = tl.load(top_p + at)
        if share < 1:
            target = share * total
            # Half a block at a time: a lane's counts and masses of three keys take its registers.
            low, high, mass = nucleus_edge(row, weights, least, best, target, WIDTH, (BLOCK + 1) // 2)
            if high - low == 1:
                # Equals: in, in order of ids, while the mass before them falls short.
                one = tl.exp(value_of(low.to(tl.int32)).to(tl.float64) / heat - top)
                fitting = tl.minimum(tl.ceil((target - mass) / one), WIDTH * 1.0)
                room = tl.maximum(fitting.to(tl.int64), 1)
        relative = tl.load(min_p + at)
        total = tl.full([], 0.0, tl.float64)
        passed = tl.full([], 0, tl.int64)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keys = keys_of(row, columns, WIDTH)
            edge = ((keys >= low) & (keys < high)).to(tl.int32)
            rank = passed + tl.cumsum(edge, 0) - edge
            passed += tl.sum(edge, 0)
            kept = (keys >= high) | ((edge != 0) & (rank < room))
            weight = tl.load(weights + columns, mask=columns < WIDTH, other=0.0)
            weight = tl.where(kept & (weight >= relative), weight, 0.0)
            tl.store(weights + columns, weight, mask=columns < WIDTH)
            total += tl.sum(weight, 0)  # block by block, as below, so that the last running sum is the total
        tl.debug_barrier()
        target = uniform(tl.load(seeds + at), tl.load(steps + at)) * total  # below the total
        running = tl.full([], 0.0, tl.float64)
        mass = tl.full([], 0.0, tl.float64)
        token = tl.full([], -1, tl.int32)
        start = tl.full([], 0, tl.int32)
        while (token < 0) & (start < WIDTH):
            columns = start + tl.arange(0, BLOCK)
            weight = tl.load(weights + columns, mask=columns < WIDTH, other=0.0)
            next_running = running + tl.sum(weight, 0)
            if next_running > target:
                beyond = running + tl.cumsum(weight, 0) > target
                token = tl.min(tl.where(beyond & (weight > 0), columns, WIDTH), 0)
                # The sum one by one, rounded otherwise, may fall short of the block's.
                last = tl.max(tl.where(weight > 0, columns, 0), 0)
                token = tl.where(token < WIDTH, token, last)
                mass = tl.sum(tl.where(columns == token, weight, 0.0), 0)
            running = next_running
            start += BLOCK
        tl.store(tokens + at, token.to(tl.int64))
        tl.store(logprobs + at, tl.log(mass / total))
    else:
        tl.store(tokens + at, best_id.to(tl.int64))
        tl.store(logprobs + at, tl.where(proper, 0.0, float("nan")).to(tl.float64))


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


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``toolkit::sample``: logits [B, V] in float32, bfloat16 or float16."""
    logits = matrix("sample", logits)
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float64, device=logits.device)
    weights = torch.empty(rows, width, dtype=torch.float64, device=logits.device)
    if rows:
        sample_row[(rows,)](
            logits, temperature.double().contiguous(), top_k.contiguous(),
            top_p.double().clamp_min(LEAST_MASS), min_p.double().clamp_max(1.0), seeds.contiguous(),
            steps.contiguous(), weights, tokens, logprobs, logits.stride(0), **_launch(width),
        )  # fmt: skip
    return tokens, logprobs


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
