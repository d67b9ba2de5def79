"""Targets of a loss: what they may be, what counts, and means over what counts."""

import torch
from torch import Tensor

from toolkit.errors import OutOfVocabularyError
from toolkit.ops import IGNORED


def checked_targets(targets: Tensor, vocabulary: int, ignore_index: int = IGNORED, name: str = "targets") -> Tensor:
    """``targets`` as the ops take them: token ids, and ``IGNORED`` where they were ``ignore_index``.

    Args:
        targets: any shape; int64.
        vocabulary: V.
        ignore_index: of the caller; like torch's, it may be a token id.
        name: what the user calls them.

    Raises:
        OutOfVocabularyError: on CPU, for anything else than ``ignore_index`` and 0 to V - 1. Elsewhere, and in a
            compiler's trace, nothing is read back: such a target becomes V, whose loss is NaN on a GPU.
    """
    readable = targets.is_cpu and type(targets) is Tensor and not torch.compiler.is_compiling()
    if readable:
        # The usual targets take one pass: token ids alone, or with -100.
        low, high = targets.aminmax() if targets.numel() else (0, 0)
        if ignore_index == IGNORED and low >= 0 and high < vocabulary:
            return targets
    ignored = targets == ignore_index
    wrong = ~ignored & ((targets < 0) | (targets >= vocabulary))
    if readable:
        if bool(wrong.any()):
            given = int(targets[wrong].flatten()[0])
            raise OutOfVocabularyError(
                f"{name} must be {ignore_index} or a token id from 0 to {vocabulary - 1}, got {given}."
            )
        return targets if ignore_index == IGNORED else torch.where(ignored, IGNORED, targets)
    return torch.where(wrong, vocabulary, torch.where(ignored, IGNORED, targets))


def mean_over(total: Tensor, count: Tensor | int) -> Tensor:
    """``total / count``, where count is a number of things that count; 0 without a gradient where there are none."""
    return total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))


def quotient(total: Tensor, count: Tensor | int) -> Tensor:
    """``total / count``; a count of 0 gives what division gives, NaN or infinity, and no gradient."""
    if not isinstance(count, Tensor):
        return total / count if count else total.detach() / count + 0.0 * total
    # Not a gradient of 0 / 0 that is masked later: anomaly detection would stop there.
    nothing = count == 0
    return torch.where(nothing, total.detach() / count, total / torch.where(nothing, 1, count))
