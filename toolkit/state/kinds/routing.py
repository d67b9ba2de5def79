"""Where a token was routed: the experts of each token in a layer of experts, beside its keys and values.

Prefix hits, forks, swaps and truncations bring a token's routing along with its state, so a completion's is always
whole, and it is the one that its state was computed by ("rollout routing replay" trains on it).
"""

import torch

from toolkit.state.kinds import StateSpec
from toolkit.state.kinds.token_rows import TokenRows


class Routing(TokenRows, kind="routing"):
    """ids [num_blocks, block_size, 1, K] int32 of one layer of experts; spec.shapes: (1, K).

    spec.layer counts the layers of experts alone. Nothing of a forward reads it.
    """

    op = "record_routing"

    @classmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(shape, torch.int32) for shape, _ in super().entries(spec, block_size, dtype)]
