"""Reward functions with TRL's signature."""

import asyncio
from typing import Any


def _texts(completions: list[Any]) -> list[str]:
    return [one if isinstance(one, str) else one[0]["content"] for one in completions]


def lower_case(completions: list[Any], **_: Any) -> list[float]:
    """The share of small letters."""
    return [sum("a" <= letter <= "z" for letter in text) / max(len(text), 1) for text in _texts(completions)]


async def has_letters_of_target(
    prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], target: list[str], **_: Any
) -> list[float | None]:
    """The share of the target's letters that are there; no opinion on an empty completion."""
    await asyncio.sleep(0)
    assert len(prompts) == len(completions) == len(completion_ids) == len(target)
    found = zip(_texts(completions), target, completion_ids)
    return [sum(letter in text for letter in set(word)) / len(set(word)) if ids else None for text, word, ids in found]
