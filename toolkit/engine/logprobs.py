"""Log-probabilities of rows of logits, as training computes them. Shapes: V vocabulary."""

import torch
from torch import Tensor


def upcast(logits: Tensor) -> Tensor:
    """Logits as they are sampled from: float64 stays on a CPU, where training has it too; else float32."""
    return logits if logits.dtype == torch.float64 and logits.device.type == "cpu" else logits.float()


def top_logprobs(logits: Tensor, lse: Tensor, count: int) -> dict[int, float]:
    """The ``count`` most probable tokens of one row [V] (-1: all) with their log-probabilities, best first."""
    values, ids = logits.topk(len(logits) if count < 0 else min(count, len(logits)))
    return dict(zip(ids.tolist(), (values - lse).tolist()))
