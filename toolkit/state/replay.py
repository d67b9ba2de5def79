"""A recorded routing, laid out for the batch that trains on it. Numbers only.

N tokens of all sequences, L layers of experts, K experts a token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError

Ints = np.ndarray


def check_routing(routing: Sequence[Tensor], counts: Sequence[int]) -> list[Ints]:
    """Each sequence's experts [its tokens, L, K] in int64, of a tensor a sequence.

    A tensor may lack its sequence's last token, which an engine never runs and whose output nobody asks for: it takes
    the experts of the token before it (of a single token: 0 to K - 1).
    Raises ToolkitError for another number of tensors or tokens, differing L or K, and negative ids.
    """
    if len(routing) != len(counts):
        raise ToolkitError(f"routing has {len(routing)} tensors; allowed is one for each of {len(counts)} sequences.")
    found: list[Ints] = []
    for index, (given, count) in enumerate(zip(routing, counts)):
        ids = torch.as_tensor(given)
        if ids.dim() != 3 or ids.is_floating_point() or len(ids) not in (count, max(count - 1, 0)):
            raise ToolkitError(
                f"routing[{index}] has shape {list(ids.shape)} and dtype {ids.dtype}; allowed are integers [tokens, "
                f"layers, experts of a token] for {count} tokens, or one less."
            )
        if ids.shape[1:] != torch.as_tensor(routing[0]).shape[1:]:
            raise ToolkitError(
                f"routing[{index}] has shape {list(ids.shape)} while routing[0] has "
                f"{list(torch.as_tensor(routing[0]).shape)}; allowed are the same layers and experts of a token."
            )
        experts = np.asarray(ids.detach().cpu().to(torch.int64))
        if experts.size and experts.min() < 0:
            raise ToolkitError(f"routing[{index}] has the expert {experts.min()}; allowed are 0 and more.")
        if len(experts) < count:
            last = experts[-1:] if len(experts) else np.broadcast_to(np.arange(ids.shape[2]), (1, *ids.shape[1:]))
            experts = np.concatenate([experts, last])
        found.append(experts)
    return found


def name_rows(tokens: Sequence[Ints], experts: Sequence[Ints]) -> tuple[list[Ints], Ints, Ints]:
    """One number for each different (token, its experts): the sequences in those, and what each number stands for.

    Sequences share a token's row only where they share its routing too: elsewhere it is another computation.
    """
    flat = np.concatenate(tokens)
    routes = np.concatenate(experts)
    both = np.concatenate([flat[:, None], routes.reshape(len(routes), -1)], 1)
    distinct, names = np.unique(both, axis=0, return_inverse=True)
    ends = np.cumsum([len(one) for one in tokens])[:-1]
    return np.split(names.reshape(-1), ends), distinct[:, 0], distinct[:, 1:].reshape(-1, *routes.shape[1:])
