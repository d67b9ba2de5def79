"""Ways to sample beyond those of the captured step, a file each: DRY, locally typical sampling, XTC.

Each is a function of one row of logits and of its sequence cut there, as ``toolkit.engine.sampler`` asks of all that
changes a row; their rows are sampled on the host. Shapes: V vocabulary.
"""

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolkit.engine.samplers.dry import dry_penalties
from toolkit.engine.samplers.typical import typical_tokens
from toolkit.engine.samplers.xtc import xtc_removed

if TYPE_CHECKING:
    from toolkit.engine import request

Row = tuple["request.Sequence", int]
"""A sequence, and how many drafted tokens stand behind its tokens."""


def penalised_by_dry(scores: Tensor, rows: Items[Row]) -> Tensor:
    """``scores`` [R, V] with DRY's penalties in new memory; themselves where no row asks for any."""
    result = scores
    for at, (sequence, drafted) in enumerate(rows):
        params, adjustments = sequence.params, sequence.request.adjustments
        if params.dry_multiplier == 0 or adjustments is None:
            continue
        tokens = sequence.tokens + sequence.draft[:drafted]
        found = dry_penalties(
            tokens, adjustments.dry_breakers, params.dry_multiplier, params.dry_base, params.dry_allowed_length
        )
        if found:
            result = scores.clone() if result is scores else result
            ids = torch.tensor(list(found), device=scores.device)
            result[at, ids] -= torch.tensor(list(found.values()), dtype=torch.float64).to(scores)
    return result


def cut_tails(scores: Tensor, rows: Items[Row]) -> Tensor:
    """``scores`` [R, V] without the tokens that ``typical_p`` and then XTC leave out, -inf in new memory.

    Themselves where no row asks for either; greedy rows do not.
    """
    result = scores
    for at, (sequence, drafted) in enumerate(rows):
        params = sequence.params
        if not params.cuts_tails:
            continue
        result = scores.clone() if result is scores else result
        row = result[at]
        if params.typical_p < 1:
            row.masked_fill_(~typical_tokens(row, params.typical_p), -torch.inf)
        if params.xtc_probability > 0:
            step = sequence.generated + drafted
            removed = xtc_removed(row, params.xtc_probability, params.xtc_threshold, sequence.seed, step)
            row.masked_fill_(removed, -torch.inf)
    return result
