"""The end of a causal language model: the loss, from logits to one number."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.token_logprob import token_logprob


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mean next-token cross-entropy in nats; logits [B, S, V], labels [B, S] int64.

    The label of position t is token t + 1 (``shift_labels`` gives them already shifted); ``ignore_index`` positions
    count for nothing. Divides by ``num_items_in_batch`` when given, by the number of counted positions otherwise.
    Keeps the logits and one number a row for backward: no copy of the probabilities.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    targets = torch.where(targets == ignore_index, -1, targets)
    logprob, _ = token_logprob(logits.reshape(-1, vocab_size), targets)
    total = -logprob.sum()
    if num_items_in_batch is None:
        return total / (targets >= 0).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
