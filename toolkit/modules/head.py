"""The end of a causal language model: the head, whose logits may wait, and the loss, from logits to one number."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.ops.linear_logprob.deferred import DeferredLogits, summed_cross_entropy

_LOSS_ONLY: ContextVar[bool] = ContextVar("loss_only", default=False)


@contextmanager
def loss_only() -> Iterator[None]:
    """Inside, logits wait without gradients too: for an evaluation of which nothing but the loss is looked at."""
    token = _LOSS_ONLY.set(True)
    try:
        yield
    finally:
        _LOSS_ONLY.reset(token)


def head_forward(
    product: Callable[..., Tensor], bitwise: bool, sharded: Callable[[], bool] = lambda: False
) -> Callable[[nn.Linear, Tensor], Tensor]:
    """Forward of an output projection, hidden [..., K] to logits [..., V]; deferred while gradients are wanted.

    product: that of ``toolkit.modules.linear`` in the bitwise tier, ``torch.nn.functional.linear`` in the fast one.
    sharded: whether the weight is whole for the duration of a forward only, so that nothing may wait for later.
    """

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        asked = _wants_gradients(self.weight, input) or _LOSS_ONLY.get()
        if asked and _may_wait(self.weight, input, bitwise) and not sharded():
            return DeferredLogits(input, self.weight, self.bias, product)
        return product(input, self.weight, self.bias)

    return forward


def _wants_gradients(weight: Tensor, hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def _may_wait(weight: Tensor, hidden: Tensor, bitwise: bool) -> bool:
    """Whether the loss may take the product, later, in its own way."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(hidden.device.type) or hidden.dtype != weight.dtype:
        return False
    # linear_logprob has the bits of linear on a CPU only: elsewhere its tiles add in another order than rollout's do.
    return not bitwise or hidden.device.type == "cpu"


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
