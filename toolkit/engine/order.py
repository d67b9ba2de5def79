"""Order statistics of rows: only comparisons, so there is one answer.

NumPy's are 5 to 15 times as fast as torch's on a CPU. NaN counts as the largest value in both.
"""

import numpy as np
import torch
from torch import Tensor


def first_largest(rows: Tensor) -> Tensor:
    """Index [B] of the largest value of each row [B, V], the lowest of equals."""
    if rows.device.type == "cpu":
        return torch.from_numpy(rows.numpy().argmax(-1))
    return rows.argmax(-1)


def largest(rows: Tensor, count: int) -> Tensor:
    """The ``count`` largest values [B, count] of each row [B, V], in descending order."""
    if rows.device.type != "cpu":
        return rows.topk(count).values
    values = rows.numpy()
    if count < values.shape[-1]:
        values = np.partition(values, -count, axis=-1)[..., -count:]
    return torch.from_numpy(np.sort(values, axis=-1)).flip(-1)
