"""Kernels that store what sampling computes on the way."""

import triton
import triton.language as tl

from toolkit.ops.sample.triton import ordered, uniform, value_of


@triton.jit
def philox_words(counter, key, words):
    c0, c1, c2, c3 = tl.philox(
        tl.load(key),
        tl.load(counter).to(tl.uint32),
        tl.load(counter + 1).to(tl.uint32),
        tl.load(counter + 2).to(tl.uint32),
        tl.load(counter + 3).to(tl.uint32),
    )
    tl.store(words, c0.to(tl.int64))
    tl.store(words + 1, c1.to(tl.int64))
    tl.store(words + 2, c2.to(tl.int64))
    tl.store(words + 3, c3.to(tl.int64))


@triton.jit
def store_uniform(seeds, steps, result):
    at = tl.program_id(0)
    tl.store(result + at, uniform(tl.load(seeds + at), tl.load(steps + at)))


@triton.jit
def store_keys(values, keys, back, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    found = ordered(tl.load(values + at))
    tl.store(keys + at, found)
    tl.store(back + at, value_of(found))
