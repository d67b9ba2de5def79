"""What a rollout recorded of its tokens, laid out for the batch that trains on it: routings, and selections of keys.

Shapes: T tokens, L layers of experts or with an indexer, K experts or selected keys per token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def check_selection(selection: Sequence[Tensor], counts: Sequence[int]) -> list[Ints]:
    """Each sequence's selected positions [its tokens, L, K] in int64: ascending, -1 behind the last one.

    A sequence's last token may be missing, as in ``check_routing``: it attends nothing.

    Args:
        selection: of each sequence the positions [its tokens or one less, L, K], integers; negative ones are none.
        counts: tokens of each sequence.

    Raises:
        ToolkitError: for another number of tensors or tokens, differing L or K, positions after the token's, and
            positions that occur twice.
    """
    if len(selection) != len(counts):
        raise ToolkitError(f"selection must have a tensor for each of {len(counts)} sequences, got {len(selection)}.")
    found: list[Ints] = []
    for index, (given, count) in enumerate(zip(selection, counts)):
        ids = torch.as_tensor(given)
        shape = list(ids.shape)
        if ids.dim() != 3 or ids.is_floating_point() or len(ids) not in (count, max(count - 1, 0)):
            raise ToolkitError(
                f"selection[{index}] must be integers [tokens, layers, keys] for {count} tokens, or one less, got "
                f"shape {shape} and dtype {ids.dtype}."
            )
        if shape[1:] != list(torch.as_tensor(selection[0]).shape[1:]):
            raise ToolkitError(f"selection[{index}] must have the layers and keys of selection[0], got shape {shape}.")
        positions = np.asarray(ids.detach().cpu().to(torch.int64))
        late = positions > np.arange(len(positions))[:, None, None]
        if late.any():
            token = int(late.any((1, 2)).argmax())
            raise ToolkitError(
                f"positions of selection[{index}] must be <= {token} for token {token}, got {positions[token].max()}."
            )
        last = np.iinfo(np.int64).max
        positions = np.sort(np.where(positions < 0, last, positions), axis=-1)
        positions[positions == last] = -1
        twice = (positions[..., 1:] == positions[..., :-1]) & (positions[..., 1:] >= 0)
        if twice.any():
            token, layer, at = np.argwhere(twice)[0]
            raise ToolkitError(
                f"positions of selection[{index}] must differ for token {token}, got {positions[token, layer, at]} "
                f"twice in layer {layer}."
            )
        missing = np.full((count - len(positions), *positions.shape[1:]), -1)
        found.append(np.concatenate([positions, missing]))
    return found


@dataclass(frozen=True)
class Recorded:
    """What was recorded of the tokens of some sequences, side by side.

    Args:
        rows: of each sequence [its tokens, columns].
        shapes: of each field of ``RaggedBatch`` (L, K) of a token.
    """

    rows: list[Ints]
    shapes: dict[str, tuple[int, int]]

    @classmethod
    def of(
        cls, routing: Sequence[Tensor] | None, selection: Sequence[Tensor] | None, counts: Sequence[int]
    ) -> "Recorded | None":
        """None where nothing was recorded, or there are no sequences. Raises as ``check_routing``."""
        fields: dict[str, list[Ints]] = {}
        if routing is not None:
            fields["routing"] = check_routing(routing, counts)
        if selection is not None:
            fields["selection"] = check_selection(selection, counts)
        if not fields or not counts:
            return None
        columns = [[one.reshape(len(one), math.prod(one.shape[1:])) for one in found] for found in fields.values()]
        return cls(
            [np.concatenate(parts, 1) for parts in zip(*columns, strict=True)],
            {name: found[0].shape[1:] for name, found in fields.items()},
        )

    def fields(self, rows: Ints, device: torch.device | str | None) -> dict[str, Tensor]:
        """The fields of a batch whose rows recorded ``rows`` [T, columns]: [L, T, K] each."""
        found, first = {}, 0
        for name, (layers, width) in self.shapes.items():
            part = rows[:, first : first + layers * width].reshape(-1, layers, width)
            found[name] = torch.from_numpy(np.ascontiguousarray(part.transpose(1, 0, 2))).to(device)
            first += layers * width
        return found


class SelectionReplay:
    """The keys that the sparse attention layers of a forward select, or were given in the place of their choice.

    Layers are counted in the order in which the forward meets their indexers.

    Args:
        given: [L, T, K] int64 positions; None to let indexers choose.

    Attributes:
        keep: whether to keep what each layer selects, for ``kept``.
    """

    def __init__(self, given: Tensor | None) -> None:
        self.given = given
        self.keep = False
        self._layers: dict[int, int] = {}
        self._kept: dict[int, Tensor] = {}

    def take(self, layer: int, choose: Callable[[], Tensor]) -> Tensor:
        """[T, K] positions of a layer's keys: those given, else those that ``choose`` returns.

        Raises ToolkitError where the selection has no such layer.
        """
        index = self._layers.setdefault(layer, len(self._layers))
        if self.given is not None and index >= len(self.given):
            raise ToolkitError(f"selection must have each of the model's indexers, got {len(self.given)}.")
        selected = choose() if self.given is None else self.given[index]
        if self.keep:
            self._kept[index] = selected
        return selected

    def kept(self) -> Tensor:
        """[L, T, K] what the layers selected while ``keep`` was set, which another batch can be given."""
        if not self._kept:
            raise ToolkitError("selections must be kept before they are read, got none; set keep before the forward.")
        return torch.stack([self._kept[index] for index in sorted(self._kept)])

    def check_complete(self) -> None:
        """After a forward: raise ToolkitError unless an indexer took every layer that was given."""
        if self.given is not None and len(self._layers) < len(self.given):
            raise ToolkitError(
                f"selection must be taken by an indexer in each of its {len(self.given)} layers, got "
                f"{len(self._layers)}."
            )


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
