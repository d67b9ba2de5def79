"""The end of a causal language model: the head, whose logits may wait, and the loss, from logits to one number."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.ops.linear_logprob.deferred import DeferredLogits, summed_cross_entropy


def head_forward(product: Callable[..., Tensor], bitwise: bool) -> Callable[[nn.Linear, Tensor], Tensor]:
    """Forward of an output projection, hidden [..., K] to logits [..., V]; deferred while gradients are wanted.

    product: that of ``toolkit.modules.linear`` in the bitwise tier, ``torch.nn.functional.linear`` in the fast one.
    """

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if wanted and _may_wait(self.weight, input, bitwise):
            return DeferredLogits(input, self.weight, self.bias, product)
        return product(input, self.weight, self.bias)

    return forward


def _may_wait(weight: Tensor, hidden: Tensor, bitwise: bool) -> bool:
    """Whether the loss may take the product, later, in its own way."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(hidden.device.type) or hidden.dtype != weight.dtype:
        return False
    # linear_logprob has the bits of linear on a CPU only: elsewhere its tiles add in another order than rollout's do.
    if bitwise and hidden.device.type != "cpu":
        return False
    return not hasattr(weight, "ds_id")  # DeepSpeed's ZeRO-3 gathers a parameter for its module's forward only


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mean next-token cross-entropy in nats; logits [B, S, V], dense or deferred, labels [B, S] int64.

    The label of position t is token t + 1 (``shift_labels`` gives them already shifted); ``ignore_index`` positions
    count for nothing. Divides by ``num_items_in_batch`` when given, by the number of counted positions otherwise.
    Deferred logits are never computed; of dense ones no copy of the probabilities is kept.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.to(logits.device).reshape(logits.shape[:-1])
    targets = torch.where(targets == ignore_index, -1, targets)
    total = summed_cross_entropy(logits, targets)
    if num_items_in_batch is None:
        return total / (targets >= 0).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
