"""DRY, don't repeat yourself: penalties for tokens that would make a repeated run of tokens longer."""

from collections.abc import Collection, Sequence

import numpy as np

LONGEST = 50
"""Tokens of a run that matter; longer ones count as so long."""


def dry_penalties(
    tokens: Sequence[int], breakers: Collection[int], multiplier: float, base: float, allowed_length: int
) -> dict[int, float]:
    """What is subtracted from the logits of tokens: ``multiplier * base ** (n - allowed_length)``, where ``n`` >= that.

    ``n`` of a token is the length of the longest run of last ``tokens`` that stood before the token earlier. A run has
    no breaker, and a breaker has no penalty.

    Args:
        tokens: of prompt and output.
        breakers: tokens that end runs.
        multiplier, base, allowed_length: as ``SamplingParams.dry_multiplier`` and the others.

    Source: P. E. Weidmann, "DRY", text-generation-webui pull request 5677 (2024).
    """
    if len(tokens) < 2 or tokens[-1] in breakers:
        return {}
    ids = np.array(tokens, dtype=np.int64)
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    longest: dict[int, int] = {}
    length = 1
    while len(ends):
        if length >= allowed_length:
            longest |= dict.fromkeys(ids[ends + 1].tolist(), length)
        if length == LONGEST or length >= len(ids) or tokens[-1 - length] in breakers:
            break
        ends = ends[ends >= length]
        ends = ends[ids[ends - length] == ids[-1 - length]]
        length += 1
    return {
        token: multiplier * base ** (count - allowed_length)
        for token, count in longest.items()
        if token not in breakers
    }
