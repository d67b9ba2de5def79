"""The head of a causal language model, whose logits may be deferred, and the loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.ops import IGNORED
from toolkit.ops.linear_logprob.deferred import DeferredLogits, summed_cross_entropy
from toolkit.ops.targets import checked_targets, quotient
from toolkit.ops.transforms import transformed

_LOSS_ONLY: ContextVar[bool] = ContextVar("loss_only", default=False)


@contextmanager
def loss_only() -> Iterator[None]:
    """Inside, logits are deferred without gradients too: for an evaluation that reads only the loss."""
    token = _LOSS_ONLY.set(True)
    try:
        yield
    finally:
        _LOSS_ONLY.reset(token)


def head_forward(
    linear: Callable[..., Tensor], bitwise: bool, sharded: Callable[[], bool] = lambda: False
) -> Callable[[nn.Linear, Tensor], Tensor]:
    """Forward of an output projection: hidden [..., K] to logits [..., V], deferred while gradients are on.

    Args:
        linear: ``toolkit.modules.linear.autocast_linear`` in bitwise mode, ``torch.nn.functional.linear`` in fast mode.
        bitwise: whether deferred logits must be bitwise identical to dense ones.
        sharded: whether the weight is gathered during the forward only, so that nothing can be deferred.
    """

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        wanted = _needs_gradients(self.weight, input) or _LOSS_ONLY.get()
        if wanted and _can_defer(self.weight, input, bitwise) and not sharded():
            return DeferredLogits(input, self.weight, self.bias, linear)
        return linear(input, self.weight, self.bias)

    return forward


def _needs_gradients(weight: Tensor, hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def _can_defer(weight: Tensor, hidden: Tensor, bitwise: bool) -> bool:
    """Whether the loss can fuse the GEMM with its softmax."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(hidden.device.type) or hidden.dtype != weight.dtype:
        return False
    if transformed():  # which sees no further than the logits' own graph
        return False
    # linear_logprob is bitwise identical to linear on CPU only: its GPU tiles have another reduction order.
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
    """Mean next-token cross-entropy in nats, as transformers' ``ForCausalLMLoss``.

    Deferred logits are never computed; for dense ones no copy of the probabilities is kept.

    Args:
        logits: [B, S, V], dense or deferred.
        labels: [B, S] int64; the label of position t is token t + 1.
        vocab_size: ignored; V.
        num_items_in_batch: the divisor; None is the number of positions that are not ignored.
        ignore_index: label of positions that are ignored.
        shift_labels: [B, S] labels that are shifted already, instead of ``labels``.

    Raises:
        ToolkitError: labels of another shape than the logits' positions.
        OutOfVocabularyError: on CPU, for a label that is neither ``ignore_index`` nor from 0 to V - 1.

    Where nothing counts the mean is NaN, as transformers' is, and every gradient is 0.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.numel() * logits.shape[-1] != logits.numel():
        raise ToolkitError(
            f"labels must have shape {list(logits.shape[:-1])}, as the logits, got {list(shift_labels.shape)}."
        )
    targets = shift_labels.to(logits.device).reshape(logits.shape[:-1])
    targets = checked_targets(targets, logits.shape[-1], ignore_index, "labels")
    total = summed_cross_entropy(logits, targets)
    if num_items_in_batch is None:
        return quotient(total, (targets != IGNORED).sum())
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return quotient(total, num_items_in_batch)
