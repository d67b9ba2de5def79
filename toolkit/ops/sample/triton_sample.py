"""Sampling in Triton: a row is cut into parts of a width set by its length alone, one program each.

Thresholds of top-k and top-p are found by radix selection on the ordered bits of the logits: a launch per digit, in
which a part counts or weighs its tokens by that digit; the next launch adds up the parts, in order, and knows the
digit. So every program of a row comes to the same one, and nothing waits within a launch. Rows whose set of tokens is
settled, or that filter nothing, return at once. Weights are float64, kept in a scratch row. All sums have one order; a
row's bits depend on that row alone. No atomics; floating-point contraction is off.

16 launches: the largest logits; what each row takes; four digits of 8 bits for top-k; weights and the first of eight
digits of 4 bits for top-p, then the others; what is kept; the token. Each reads a row once, 2 or 4 bytes a logit, and
from top-p on 8 of its weight. At V = 151,936 a row is 38 programs. One program a row, which searched 2 bits a pass, had
one row on one multiprocessor, in up to 16 passes for each threshold.
"""

import torch
import triton
import triton.language as tl

from toolkit.ops.sample.reference import LEAST_MASS
from toolkit.ops.sample.triton import LOWEST, MAX_BLOCK, keys_of, positions, uniform, value_of
from toolkit.ops.triton_rows import EXACT, blocks, matrix, power_of_2

MAX_PARTS = 64  # of a row; longer ones have wider parts

_NO_CHANCE = tl.constexpr(-2139095041 + 2**31)  # the position of -inf

# What a row takes.
_SAMPLED = tl.constexpr(1)
_BY_COUNT = tl.constexpr(2)
_BY_MASS = tl.constexpr(4)

# Bits of a digit, and how many values it has: of counts by a histogram, of masses by a sum for each value.
_COUNT_BITS = 8
_MASS_BITS = 4
_COUNTED = tl.constexpr(1 << _COUNT_BITS)
_WEIGHED = tl.constexpr(1 << _MASS_BITS)


@triton.jit
def best_of_part(logits, bests, first_columns, stride, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key of a part, and the first column that has it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    keys = keys_of(logits + row * stride, columns, WIDTH)
    best = tl.max(keys, 0)
    tl.store(bests + row * COUNT + part, best)
    tl.store(first_columns + row * COUNT + part, tl.min(tl.where(keys == best, columns, WIDTH), 0))


@triton.jit
def plan_row(
    bests, first_columns, temperature, top_k, top_p, heats, tops, ends, tasks, tokens, logprobs,
    COUNT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What a row takes, as bits of ``tasks``, its temperature, largest score and the position above its largest logit.

    Of a row that is not sampled the token, which is the first of its largest logits.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    held = tl.load(bests + row * COUNT + part, mask=part < COUNT, other=LOWEST)
    best = tl.max(held, 0)
    heat = tl.load(temperature + row)
    hot = heat > 0
    heat = tl.where(hot, heat, 1.0)
    top = value_of(best).to(tl.float64) / heat
    proper = top - top == 0  # neither infinite nor NaN
    k = tl.load(top_k + row)
    by_count, by_mass = (k > 0) & (k < WIDTH), tl.load(top_p + row) < 1
    task = tl.where(by_count, _BY_COUNT, 0) | tl.where(by_mass, _BY_MASS, 0) | _SAMPLED
    tl.store(tasks + row, tl.where(hot & proper, task, 0))
    tl.store(heats + row, heat)
    tl.store(tops + row, top)
    tl.store(ends + row, positions(best) + 1)
    columns = tl.load(first_columns + row * COUNT + part, mask=part < COUNT, other=WIDTH)
    tl.store(tokens + row, tl.min(tl.where(held == best, columns, WIDTH), 0).to(tl.int64))
    tl.store(logprobs + row, tl.where(proper, 0.0, float("nan")).to(tl.float64))


@triton.jit
def added_up(sums, row, COUNT: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr):
    """[BINS]: the sums of a row's parts, added in one order."""
    part, bins = tl.arange(0, PARTS)[:, None], tl.arange(0, BINS)[None, :]
    return tl.sum(tl.load(sums + (row * COUNT + part) * BINS + bins, mask=part < COUNT, other=0), 0)


@triton.jit
def narrowed_by_count(found, counts, row, k, shift, COUNT: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr):
    """(low, above, settled) of top-k once the digit at shift is counted.

    Fewer than k tokens are above the interval that begins at ``low``, ``above`` of them; with those in it there are k
    or more. It is settled where there are k: then all from ``low`` up are in.
    """
    low, above, settled = tl.load(found + row * 3), tl.load(found + row * 3 + 1), tl.load(found + row * 3 + 2)
    if settled == 0:
        bins = tl.arange(0, BINS)
        each = added_up(counts, row, COUNT, PARTS, BINS).to(tl.int64)
        reach = above + tl.cumsum(each, 0, reverse=True)
        digit = tl.max(tl.where(reach >= k, bins, 0), 0)
        above += tl.sum(tl.where(bins > digit, each, 0), 0)
        low += digit.to(tl.int64) << shift
        settled = (above + tl.sum(tl.where(bins == digit, each, 0), 0) == k).to(tl.int64)
    return low, above, settled


@triton.jit(do_not_specialize=["shift"])
def count_digit(
    logits, top_k, tasks, found, counts, next_found, next_counts, stride, shift,
    FIRST: tl.constexpr, BITS: tl.constexpr,
    COUNT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part's tokens in the interval that is left of top-k, by the digit at shift."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(tasks + row) & _BY_COUNT == 0:
        return
    k = tl.load(top_k + row)
    low = tl.full([], 0, tl.int64)
    settled = tl.full([], 0, tl.int64)
    if not FIRST:
        low, above, settled = narrowed_by_count(found, counts, row, k, shift + BITS, COUNT, PARTS, 1 << BITS)
        if part == 0:
            tl.store(next_found + row * 3, low)
            tl.store(next_found + row * 3 + 1, above)
            tl.store(next_found + row * 3 + 2, settled)
    if settled == 0:
        columns = part * BLOCK + tl.arange(0, BLOCK)
        where = positions(keys_of(logits + row * stride, columns, WIDTH))
        mask = (columns < WIDTH) & ((where >> (shift + BITS)) == (low >> (shift + BITS)))
        digits = ((where >> shift) & ((1 << BITS) - 1)).to(tl.int32)
        bins = tl.arange(0, 1 << BITS)
        tl.store(next_counts + ((row * COUNT + part) << BITS) + bins, tl.histogram(digits, 1 << BITS, mask=mask))


@triton.jit
def by_digit(where, weights, mask, masses, numbers, shift, BINS: tl.constexpr):
    """``masses`` and ``numbers`` [BINS, N] of lanes, with what N tokens in ``mask`` add to their digit's."""
    hits = (((where >> shift) & (BINS - 1)) == tl.arange(0, BINS)[:, None]) & mask
    return masses + tl.where(hits, weights, 0.0), numbers + hits.to(tl.int32)


@triton.jit
def store_by_digit(masses, numbers, next_masses, next_numbers, at, BINS: tl.constexpr):
    """The lanes of a part added up."""
    bins = tl.arange(0, BINS)
    tl.store(next_masses + at * BINS + bins, tl.sum(masses, 1))
    tl.store(next_numbers + at * BINS + bins, tl.sum(numbers, 1))


@triton.jit
def narrowed_by_mass(
    found, found_mass, masses, numbers, share, row, shift, BITS: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(low, high, settled, mass, target) of top-p once the digit at shift is weighed.

    Keys at positions from ``high`` up are in and weigh ``mass``, short of ``target``; with those from ``low`` to below
    ``high`` it is reached. It is settled where these are one token.
    """
    low, high, settled = tl.load(found + row * 3), tl.load(found + row * 3 + 1), tl.load(found + row * 3 + 2)
    mass, target = tl.load(found_mass + row * 2), tl.load(found_mass + row * 2 + 1)
    if settled == 0:
        bins = tl.arange(0, 1 << BITS)
        each = added_up(masses, row, COUNT, PARTS, 1 << BITS)
        number = added_up(numbers, row, COUNT, PARTS, 1 << BITS)
        if shift + BITS == 32:
            target = share * tl.sum(each, 0)
        reach = mass + tl.cumsum(each, 0, reverse=True)
        # None may reach by rounding: then it is the lowest that has a token.
        digit = tl.max(tl.where((reach >= target) & (number > 0), bins, -1), 0)
        digit = tl.where(digit < 0, tl.min(tl.where(number > 0, bins, 1 << BITS), 0), digit)
        mass = tl.where(digit + 1 < 1 << BITS, tl.sum(tl.where(bins == digit + 1, reach, 0.0), 0), mass)
        low += digit.to(tl.int64) << shift
        high = low + (tl.full([], 1, tl.int64) << shift)
        settled = (tl.sum(tl.where(bins == digit, number, 0), 0) <= 1).to(tl.int64)
    return low, high, settled, mass, target


@triton.jit
def weigh(
    logits, top_k, tasks, heats, tops, found, counts, least, weights, next_masses, next_numbers, stride,
    COUNT_BITS: tl.constexpr, BITS: tl.constexpr,
    COUNT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The weights of a part, 0 for what top-k leaves out, and their sums by the first digit where top-p asks."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    task = tl.load(tasks + row)
    if task & _SAMPLED == 0:
        return
    heat, top = tl.load(heats + row), tl.load(tops + row)
    low = tl.full([], _NO_CHANCE, tl.int64)
    if task & _BY_COUNT != 0:
        low, _, _ = narrowed_by_count(found, counts, row, tl.load(top_k + row), 0, COUNT, PARTS, 1 << COUNT_BITS)
    if part == 0:
        tl.store(least + row, low)
    masses = tl.zeros([1 << BITS, LANES], tl.float64)
    numbers = tl.zeros([1 << BITS, LANES], tl.int32)
    for start in range(0, BLOCK, LANES):
        columns = part * BLOCK + start + tl.arange(0, LANES)
        inside = columns < WIDTH
        keys = keys_of(logits + row * stride, columns, WIDTH)
        where = positions(keys)
        kept = inside & (where >= low)
        weight = tl.where(kept, tl.exp(value_of(keys).to(tl.float64) / heat - top), 0.0)
        tl.store(weights + row * WIDTH + columns, weight, mask=inside)
        if task & _BY_MASS != 0:
            masses, numbers = by_digit(where, weight, kept, masses, numbers, 32 - BITS, 1 << BITS)
    if task & _BY_MASS != 0:
        store_by_digit(masses, numbers, next_masses, next_numbers, row * COUNT + part, 1 << BITS)


@triton.jit(do_not_specialize=["shift"])
def weigh_digit(
    logits, top_p, tasks, least, weights, found, found_mass, masses, numbers,
    next_found, next_found_mass, next_masses, next_numbers, stride, shift,
    BITS: tl.constexpr,
    COUNT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The weights of a part in the interval that is left of top-p, by the digit at shift."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(tasks + row) & _BY_MASS == 0:
        return
    share = tl.load(top_p + row)
    low, high, settled, mass, target = narrowed_by_mass(
        found, found_mass, masses, numbers, share, row, shift + BITS, BITS, COUNT, PARTS
    )
    if part == 0:
        tl.store(next_found + row * 3, low)
        tl.store(next_found + row * 3 + 1, high)
        tl.store(next_found + row * 3 + 2, settled)
        tl.store(next_found_mass + row * 2, mass)
        tl.store(next_found_mass + row * 2 + 1, target)
    if settled == 0:
        floor = tl.maximum(low, tl.load(least + row))
        sums = tl.zeros([1 << BITS, LANES], tl.float64)
        number = tl.zeros([1 << BITS, LANES], tl.int32)
        for start in range(0, BLOCK, LANES):
            columns = part * BLOCK + start + tl.arange(0, LANES)
            inside = columns < WIDTH
            where = positions(keys_of(logits + row * stride, columns, WIDTH))
            weight = tl.load(weights + row * WIDTH + columns, mask=inside, other=0.0)
            mask = inside & (where >= floor) & (where < high)
            sums, number = by_digit(where, weight, mask, sums, number, shift, 1 << BITS)
        store_by_digit(sums, number, next_masses, next_numbers, row * COUNT + part, 1 << BITS)


@triton.jit
def keep(
    logits, top_p, min_p, tasks, heats, tops, ends, least, weights, found, found_mass, masses, numbers, totals, stride,
    BITS: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights of a part that top-p and min-p leave, the others 0, and their sum."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    task = tl.load(tasks + row)
    if task & _SAMPLED == 0:
        return
    heat, top = tl.load(heats + row), tl.load(tops + row)
    low, high = tl.load(least + row), tl.load(ends + row)
    room = tl.full([], WIDTH, tl.int64)
    passed = tl.full([], 0, tl.int64)
    if task & _BY_MASS != 0:
        share = tl.load(top_p + row)
        low, high, _, mass, target = narrowed_by_mass(
            found, found_mass, masses, numbers, share, row, 0, BITS, COUNT, PARTS
        )
        if high - low == 1:
            # Equals: in, in order of ids, while the mass before them falls short.
            one = tl.exp(value_of((low + LOWEST).to(tl.int32)).to(tl.float64) / heat - top)
            fitting = tl.minimum(tl.ceil((target - mass) / one), WIDTH * 1.0)
            room = tl.maximum(fitting.to(tl.int64), 1)
            parts = tl.arange(0, PARTS)
            at = ((row * COUNT + parts) << BITS) + (low & ((1 << BITS) - 1))
            passed = tl.sum(tl.load(numbers + at, mask=parts < part, other=0), 0).to(tl.int64)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    where = positions(keys_of(logits + row * stride, columns, WIDTH))
    edge = ((where >= low) & (where < high)).to(tl.int32)
    rank = passed + tl.cumsum(edge, 0) - edge
    kept = (where >= high) | ((edge != 0) & (rank < room))
    weight = tl.load(weights + row * WIDTH + columns, mask=inside, other=0.0)
    weight = tl.where(kept & (weight >= tl.load(min_p + row)), weight, 0.0)
    tl.store(weights + row * WIDTH + columns, weight, mask=inside)
    tl.store(totals + row * COUNT + part, tl.sum(weight, 0))


@triton.jit
def choose(
    tasks, seeds, steps, weights, totals, tokens, logprobs,
    COUNT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token at which the running sum of the weights kept exceeds its share, and its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(tasks + row) & _SAMPLED == 0:
        return
    parts = tl.arange(0, PARTS)
    there = parts < COUNT
    # The sums up to each part: the last one is the total, so that it is passed.
    reach = tl.cumsum(tl.load(totals + row * COUNT + parts, mask=there, other=0.0), 0)
    total = tl.sum(tl.where(parts == COUNT - 1, reach, 0.0), 0)
    target = uniform(tl.load(seeds + row), tl.load(steps + row)) * total  # below the total
    part = tl.min(tl.where(there & (reach > target), parts, COUNT - 1), 0)
    running = tl.sum(tl.where(parts == part - 1, reach, 0.0), 0)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    beyond = running + tl.cumsum(weight, 0) > target
    token = tl.min(tl.where(beyond & (weight > 0), columns, WIDTH), 0)
    # The sum one by one, rounded otherwise, may fall short of the part's.
    token = tl.where(token < WIDTH, token, tl.max(tl.where(weight > 0, columns, 0), 0))
    mass = tl.sum(tl.where(columns == token, weight, 0.0), 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.log(mass / total))


def part_width(width: int) -> int:
    """Columns of a part, from the row's length alone."""
    return max(128, min(power_of_2(width), MAX_BLOCK), power_of_2(blocks(width, MAX_PARTS)))


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

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    tokens, logprobs = empty(torch.int64), empty(torch.float64)
    if not rows:
        return tokens, logprobs
    block = part_width(width)
    count = blocks(width, block)
    warps = min(16, max(1, block // 256))
    row = {"COUNT": count, "PARTS": power_of_2(count)}
    part = row | {"WIDTH": width, "BLOCK": block, "num_warps": warps, "num_stages": 1} | EXACT
    lanes = {"BITS": _MASS_BITS, "LANES": min(block, 32 * warps)}
    grid, stride = (rows, count), logits.stride(0)
    share = top_p.double().clamp_min(LEAST_MASS).contiguous()
    wanted = top_k.contiguous()

    bests, first_columns = empty(torch.int32, count), empty(torch.int32, count)
    best_of_part[grid](
        logits, bests, first_columns, stride, COUNT=count, WIDTH=width, BLOCK=block, num_warps=warps, **EXACT
    )
    tasks, ends = empty(torch.int32), empty(torch.int64)
    heats, tops = empty(torch.float64), empty(torch.float64)
    plan_row[(rows,)](
        bests, first_columns, temperature.double().contiguous(), wanted, share, heats, tops, ends, tasks,
        tokens, logprobs, WIDTH=width, num_warps=1, **row, **EXACT,
    )  # fmt: skip
    found, next_found = (torch.zeros(rows, 3, dtype=torch.int64, device=logits.device) for _ in range(2))
    counts, next_counts = (empty(torch.int32, count, _COUNTED.value) for _ in range(2))
    for shift in range(32 - _COUNT_BITS, -1, -_COUNT_BITS):
        count_digit[grid](
            logits, wanted, tasks, found, counts, next_found, next_counts, stride,
            shift, FIRST=shift + _COUNT_BITS == 32, BITS=_COUNT_BITS, **part,
        )  # fmt: skip
        counts, next_counts = next_counts, counts
        found, next_found = next_found, found
    least, weights = empty(torch.int64), empty(torch.float64, width)
    masses, next_masses = (empty(torch.float64, count, _WEIGHED.value) for _ in range(2))
    numbers, next_numbers = (empty(torch.int32, count, _WEIGHED.value) for _ in range(2))
    weigh[grid](
        logits, wanted, tasks, heats, tops, found, counts, least, weights, masses, numbers, stride,
        COUNT_BITS=_COUNT_BITS, **part, **lanes,
    )  # fmt: skip
    found, next_found = (torch.zeros_like(found) for _ in range(2))
    found_mass, next_found_mass = (torch.zeros(rows, 2, dtype=torch.float64, device=logits.device) for _ in range(2))
    for shift in range(32 - 2 * _MASS_BITS, -1, -_MASS_BITS):
        weigh_digit[grid](
            logits, share, tasks, least, weights, found, found_mass, masses, numbers,
            next_found, next_found_mass, next_masses, next_numbers, stride, shift, **part, **lanes,
        )  # fmt: skip
        found, next_found = next_found, found
        found_mass, next_found_mass = next_found_mass, found_mass
        masses, next_masses = next_masses, masses
        numbers, next_numbers = next_numbers, numbers
    totals = empty(torch.float64, count)
    keep[grid](
        logits, share, min_p.double().clamp_max(1.0).contiguous(), tasks, heats, tops, ends, least, weights,
        found, found_mass, masses, numbers, totals, stride, BITS=_MASS_BITS, **part,
    )  # fmt: skip
    choose[(rows,)](tasks, seeds.contiguous(), steps.contiguous(), weights, totals, tokens, logprobs, **part)
    return tokens, logprobs
