"""Schedules under which the engine records something of every token: prompts, limits, and what they must reach."""

import random
from typing import Any

import pytest

from toolkit.engine import Engine, SamplingParams


def prompts(seed: int, count: int) -> list[list[int]]:
    """Some begin with others; some are shorter than what an indexer selects."""
    source = random.Random(seed)
    found: list[list[int]] = []
    for _ in range(count):
        stem = source.choice(found)[: source.randint(1, 40)] if found and source.random() < 0.6 else []
        found.append([*stem, *(source.randrange(3, 331) for _ in range(source.randint(1, 30)))])
    return found


under_limits = pytest.mark.parametrize(
    "limits",
    [
        {},
        {"block_size": 4, "num_blocks": 22, "max_num_batched_tokens": 16, "swap_space": 0},
        {"block_size": 4, "num_blocks": 22, "max_num_batched_tokens": 16, "swap_space": None},
        {"enable_prefix_caching": False, "max_num_seqs": 3, "max_num_batched_tokens": 9},
    ],
)


def completions_under(model: Any, option: str, limits: dict[str, Any]) -> list[Any]:
    """Completions of an engine with ``option`` on; its schedule preempts, swaps and hits prefixes as limits say."""
    with Engine(model, **{option: True}, **limits) as engine:
        params = SamplingParams(n=2, max_tokens=9, ignore_eos=True, seed=1)
        completions = engine.generate(prompts(0, 6), params)
        completions += engine.generate(prompts(0, 3), params)
        stats = engine.stats()
        engine.check_integrity()
    if "num_blocks" in limits:
        assert stats["num_preemptions"] > 0
        assert (stats["num_swaps"] > 0) == (limits["swap_space"] is None)
    if limits.get("enable_prefix_caching", True):
        assert stats["prefix_cache_hits"] > 0
    return completions
