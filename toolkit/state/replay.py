"""A recorded routing: laid out for the batch that trains on it, and handed to its routers.

Shapes: T tokens, L layers of experts, K experts per token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError

Ints = np.ndarray


def check_routing(routing: Sequence[Tensor], counts: Sequence[int]) -> list[Ints]:
    """Each sequence's experts [its tokens, L, K] in int64.

    A sequence's last token may be missing, since an engine never runs it and nothing needs its output: it takes the
    experts of the token before it (of a single token: 0 to K - 1).

    Args:
        routing: of each sequence the experts [its tokens or one less, L, K], integers.
        counts: tokens of each sequence.

    Raises:
        ToolkitError: for another number of tensors or tokens, differing L or K, and negative ids.
    """
    if len(routing) != len(counts):
        raise ToolkitError(f"routing must have a tensor for each of {len(counts)} sequences, got {len(routing)}.")
    found: list[Ints] = []
    for index, (given, count) in enumerate(zip(routing, counts)):
        ids = torch.as_tensor(given)
        if ids.dim() != 3 or ids.is_floating_point() or len(ids) not in (count, max(count - 1, 0)):
            raise ToolkitError(
                f"routing[{index}] must be integers [tokens, layers, experts per token] for {count} tokens, or one "
                f"less, got shape {list(ids.shape)} and dtype {ids.dtype}."
            )
        if ids.shape[1:] != torch.as_tensor(routing[0]).shape[1:]:
            raise ToolkitError(
                f"routing[{index}] must have the layers and experts per token of routing[0], which has shape "
                f"{list(torch.as_tensor(routing[0]).shape)}, got {list(ids.shape)}."
            )
        experts = np.asarray(ids.detach().cpu().to(torch.int64))
        if experts.size and experts.min() < 0:
            raise ToolkitError(f"experts of routing[{index}] must be >= 0, got {experts.min()}.")
        if len(experts) < count:
            last = experts[-1:] if len(experts) else np.broadcast_to(np.arange(ids.shape[2]), (1, *ids.shape[1:]))
            experts = np.concatenate([experts, last])
        found.append(experts)
    return found


def name_rows(tokens: Sequence[Ints], experts: Sequence[Ints]) -> tuple[list[Ints], Ints, Ints]:
    """The sequences with one number for each distinct (token, its experts), which only shared rows have in common.

    Sequences share a token's row only where they share its routing too: elsewhere it is another computation.

    Args:
        tokens: ids of each sequence.
        experts: of each sequence [its tokens, L, K].

    Returns:
        The sequences in those numbers; the token of each number; the experts [numbers, L, K] of each number.
    """
    flat = np.concatenate(tokens)
    routes = np.concatenate(experts)
    both = np.concatenate([flat[:, None], routes.reshape(len(routes), -1)], 1)
    distinct, names = np.unique(both, axis=0, return_inverse=True)
    ends = np.cumsum([len(one) for one in tokens])[:-1]
    return np.split(names.reshape(-1), ends), distinct[:, 0], distinct[:, 1:].reshape(-1, *routes.shape[1:])


class RoutingReplay:
    """The experts that the tokens of a forward take in the place of their routers' choice; knows which layers did.

    Args:
        routing: [L, T, K] int64.
    """

    def __init__(self, routing: Tensor) -> None:
        self.routing = routing
        self._num_experts: int | None = None
        self._layers_taken: set[int] = set()

    def take(self, layer: int, num_experts: int) -> Tensor:
        """[T, K] the experts of every token in a layer, counted among the layers of experts.

        Raises ToolkitError where the routing has no such layer, or an expert that is not below ``num_experts``.
        """
        if layer >= len(self.routing):
            raise ToolkitError(f"routing must have each of the model's layers of experts, got {len(self.routing)}.")
        if self._num_experts is None:
            self._num_experts = int(self.routing.amax()) + 1 if self.routing.numel() else 0
        if self._num_experts > num_experts:
            raise ToolkitError(f"experts of a routing must be < {num_experts}, got {self._num_experts - 1}.")
        self._layers_taken.add(layer)
        return self.routing[layer]

    def check_complete(self) -> None:
        """After a forward: raise ToolkitError unless a router took every layer."""
        missing = sorted(set(range(len(self.routing))) - self._layers_taken)
        if missing:
            raise ToolkitError(
                f"routing must be taken by a router in each of its {len(self.routing)} layers, got none for {missing}. "
                "Replay needs every router patched (role 'router')."
            )
