"""The loss of a model's indexers in a forward: how far their scores are from what attention weighs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.index_loss import attention_distribution, index_loss


@dataclass
class IndexLosses:
    """What a block of ``index_losses`` saw; of several forwards one after the other.

    Attributes:
        layers: of each layer with an indexer [T] losses in nats, by its index, with gradients to the indexer alone.
        counts: beside them [T], how many tokens of samples each row stands for: 0 of padding, several of a shared
            prefix.
        without_gradients: whether an indexer ran while gradients were off, and was not seen.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)
    without_gradients: bool = False

    def add(self, layer: int, losses: Tensor, counts: Tensor) -> None:
        """The losses [T] of one more forward of a layer, and its counts [T]."""
        for kept, more in ((self.layers, losses), (self.counts, counts)):
            kept[layer] = torch.cat([kept[layer], more]) if layer in kept else more

    def mean(self) -> Tensor:
        """Mean over tokens, the sum over layers: what is added to an objective. 0 where there was no indexer.

        Raises:
            ToolkitError: indexers ran, and all of them without gradients.
        """
        if not self.layers:
            if self.without_gradients:
                raise ToolkitError(
                    "losses of indexers must be computed with gradients, got a forward without; use activation "
                    "checkpointing with use_reentrant=False, or none."
                )
            return torch.zeros(())
        counts = (self.counts[layer] for layer in self.layers)
        means = [(one * n).sum() / n.sum().clamp_min(1) for one, n in zip(self.layers.values(), counts)]
        return torch.stack(means).sum()


class _Thread(threading.local):
    """There from the start, since compiled graphs depend on which attributes exist."""

    def __init__(self) -> None:
        self.losses: IndexLosses | None = None


_thread = _Thread()
_OBSERVED = "toolkit_indexers_observed"


@contextmanager
def index_losses(losses: IndexLosses | None = None) -> Iterator[IndexLosses]:
    """Inside, forwards with gradients compute every indexer's ``toolkit.ops.index_loss`` over what it selected.

    An indexer gets no gradient from a model's own loss, and the model none from an indexer's. ::

        with index_losses() as losses:
            loss = model(input_ids, labels=labels).loss
        (loss + losses.mean()).backward()

    Holds for ordinary calls and ragged batches, of patched models whose sparse attention is claimed. A layer that
    activation checkpointing runs again (``use_reentrant=False``) is not counted again.

    Args:
        losses: where they are added; None for a new one.
    """
    outer, _thread.losses = _thread.losses, IndexLosses() if losses is None else losses
    try:
        yield _thread.losses
    finally:
        _thread.losses = outer


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def observed(forward: Any) -> bool:
    """Whether the losses of indexers are computed in this thread's forward.

    A layer that activation checkpointing runs again computes what its first run did, though nobody takes it: autograd
    compares the two.

    Args:
        forward: an object that all layers of a forward are given, by their second run too.
    """
    if _in_backward():
        return bool(getattr(forward, _OBSERVED, False))
    losses = _thread.losses
    if losses is None:
        return False
    if not torch.is_grad_enabled():
        losses.without_gradients = True
        return False
    setattr(forward, _OBSERVED, True)
    return True


def observe_indexer(
    layer: int,
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor,
    index_scale: float,
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    multiplicity: Tensor | None,
) -> None:
    """Compute a layer's loss for this thread's ``index_losses``, if there is one."""
    again, losses = _in_backward(), _thread.losses
    if again or losses is not None:
        target = attention_distribution(q.detach(), k.detach(), rows, scale)
        found = index_loss(index_q, index_k, weights, rows, target, index_scale)
        if not again and losses is not None:
            seen = (rows >= 0).any(1)
            losses.add(layer, found, seen if multiplicity is None else seen * multiplicity)
