"""TRL's packed rows as a ragged batch: the training forward of AsyncGRPOTrainer with the engine's bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from toolkit.errors import ToolkitError
from toolkit.ops.linear_logprob.deferred import token_statistics
from toolkit.patching.logprobs import predictions
from toolkit.state import RaggedBatch

IGNORED = -100


@dataclass(frozen=True)
class PackedRow:
    """A prefix tree of samples, as TRL packs it: segments of tokens, one after the other.

    Args:
        tokens: [N] int64, on the CPU.
        labels: [N] the next token of each, ``IGNORED`` where it is not trained.
        depths: [N] positions in the samples.
        ends: [segments + 1] where segments begin and end.
        paths: of each segment the positions in the row from its sample's beginning to its own end.
    """

    tokens: Tensor
    labels: Tensor
    depths: Tensor
    ends: list[int]
    paths: list[Tensor]

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> "PackedRow":
        """The row of a call's arguments."""
        tokens, labels, depths = (inputs[name][0].cpu() for name in ("input_ids", "shift_labels", "position_ids"))
        ends, bounds = (inputs[name].tolist() for name in ("tree_cu_seqlens_q", "tree_cu_seqlens_k"))
        index = inputs["tree_kv_index"].cpu()
        return cls(tokens, labels, depths, ends, [index[first:last] for first, last in pairwise(bounds)])

    @cached_property
    def leaves(self) -> list[Tensor]:
        """The paths of whole samples: those that no other continues."""
        continued = set()
        for path, (first, last) in zip(self.paths, pairwise(self.ends)):
            above = len(path) - (last - first)
            if above:
                continued.add(int(path[above - 1]))
        return [path for path in self.paths if int(path[-1]) not in continued]

    def tokens_to(self, position: int) -> Tensor:
        """The tokens of a sample up to ``position`` in the row, and the label behind it."""
        segment = int(torch.searchsorted(torch.tensor(self.ends), position, right=True)) - 1
        path = self.paths[segment][: int(self.depths[position]) + 1]
        return torch.cat([self.tokens[path], self.labels[position : position + 1]])


class TreeForward:
    """Stands in for a model's forward: TRL's packed rows run over prefix trees, any other call as before.

    Args:
        model: patched.

    Attributes:
        row: of the last call.
        log_probs: [N] of its labels, detached.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._own = model, model.forward
        self.row: PackedRow | None = None
        self.log_probs: Tensor | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if "tree_kv_index" not in keywords:
            return self._own(*arguments, **keywords)
        if keywords.get("output_router_logits"):
            raise ToolkitError("args.router_aux_loss_coef must be 0.0, got a loss of the routers.")
        row = self.row = PackedRow.of(keywords)
        sequences = [row.tokens[path] for path in row.leaves]
        predicting = []  # positions in the row whose next token counts, of each sample from its first one on
        for path in row.leaves:
            trained = (row.labels[path[:-1]] != IGNORED).nonzero()
            predicting.append(path[int(trained[0]) : -1] if len(trained) else path[:0])
        device = keywords["input_ids"].device
        batch = RaggedBatch.from_sequences(sequences, device)
        values = predictions(self._model, batch, sequences, list(map(len, predicting)), _statistics)
        # What several samples share is one prediction; of its indices in ``values`` the first is taken.
        at: dict[int, int] = {}
        for index, position in enumerate(torch.cat(predicting).tolist()):
            at.setdefault(position, index)
        kept = [position for position in at if row.labels[position] != IGNORED]
        indices = torch.tensor([at[position] for position in kept], device=device)
        positions = torch.tensor(kept, device=device)
        zeros = torch.zeros(len(row.tokens), dtype=torch.float32, device=device)
        log_probs, entropy = (zeros.index_copy(0, positions, one.float()[indices]) for one in values)
        self.log_probs = log_probs.detach()
        return FusedCausalLMOutput(log_probs=log_probs.unsqueeze(0), entropy=entropy.unsqueeze(0))


def _statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Log-probability and entropy, in nats."""
    logprob, _, entropy, _ = token_statistics(logits, targets)
    return logprob, entropy
