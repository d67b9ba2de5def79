"""The loss of a model's indexers in a forward: how far their scores are from what attention weighs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.ops.index_loss import attention_distribution, index_loss


@dataclass
class IndexLosses:
    """What a block of ``index_losses`` saw.

    Attributes:
        layers: of each layer with an indexer [T] losses in nats, by its index, with gradients to the indexer alone.
        counts: [T] how many tokens of samples each row stands for: 0 of padding, several of a shared prefix.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None

    def mean(self) -> Tensor:
        """Mean over tokens, the sum over layers: what is added to an objective. 0 where no indexer was seen."""
        if self.counts is None:
            return torch.zeros(())
        total = torch.stack(list(self.layers.values())).sum(0)
        return (total * self.counts).sum() / self.counts.sum().clamp_min(1)


class _Thread(threading.local):
    """There from the start, since compiled graphs depend on which attributes exist."""

    def __init__(self) -> None:
        self.losses: IndexLosses | None = None


_thread = _Thread()


@contextmanager
def index_losses() -> Iterator[IndexLosses]:
    """Inside, forwards with gradients compute every indexer's ``toolkit.ops.index_loss`` over what it selected.

    An indexer gets no gradient from a model's own loss, and the model none from an indexer's. ::

        with index_losses() as losses:
            loss = model(input_ids, labels=labels).loss
        (loss + losses.mean()).backward()

    Holds for ordinary calls and ragged batches, of patched models whose sparse attention is claimed. A layer that
    activation checkpointing runs again is not counted again.
    """
    outer, _thread.losses = _thread.losses, IndexLosses()
    try:
        yield _thread.losses
    finally:
        _thread.losses = outer


def observed() -> bool:
    """Whether this thread's forward computes the losses of indexers."""
    in_backward = torch._C._current_graph_task_id() != -1
    return _thread.losses is not None and torch.is_grad_enabled() and not in_backward


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
    losses = _thread.losses
    if losses is not None:
        target = attention_distribution(q.detach(), k.detach(), rows, scale)
        losses.layers[layer] = index_loss(index_q, index_k, weights, rows, target, index_scale)
        seen = (rows >= 0).any(1)
        losses.counts = seen if multiplicity is None else seen * multiplicity
