"""The largest of a row: only comparisons, so the result is unique.

NumPy's is 5 to 15 times as fast as torch's on a CPU. NaN counts as the largest value in both.
"""

import torch
from torch import Tensor


def first_largest(rows: Tensor) -> Tensor:
    """Index [B] of the largest value of each row [B, V], the lowest of equals."""
    if rows.device.type == "cpu":
        return torch.from_numpy(rows.numpy().argmax(-1))
    return rows.argmax(-1)
