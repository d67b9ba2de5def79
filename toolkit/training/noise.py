"""NEFTune (Jain et al., 2023): noise on the embeddings of sequences in training."""

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.state.active import get_forward_context


def add_embedding_noise(model: Any, alpha: float) -> None:
    """Let forwards with gradients of a model in training add noise to its embeddings.

    Every element gets ``alpha / sqrt(n d) u``, u uniform in -1 .. 1 from torch's global generator, n the tokens of its
    sequence, d the hidden size. Forwards of other modes are as they were.
    """

    def add(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not (module.training and torch.is_grad_enabled()):
            return output
        lengths = _lengths(output)
        scale = alpha / torch.sqrt(lengths * output.shape[-1])
        noise = torch.empty_like(output).uniform_(-1.0, 1.0)
        return output + noise * scale[..., None].to(output.dtype)

    model.get_input_embeddings().register_forward_hook(add)


def _lengths(output: Tensor) -> Tensor:
    """Tokens of the sequence that each row of embeddings [..., T, d] is of."""
    context = get_forward_context()
    if context is None:
        return torch.full(output.shape[:-1], float(output.shape[-2]), device=output.device)
    counts = context.batch.query_offsets.diff()
    rows = torch.full((output.shape[-2],), 1.0, device=output.device)  # of what is behind the last sequence
    rows[: int(counts.sum())] = counts.repeat_interleave(counts).to(rows.dtype)
    return rows.expand(output.shape[:-1])
