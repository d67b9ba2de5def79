"""llama.cpp's log-probabilities of an exported file beside a model's own, teacher-forced."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from toolkit.exporting.gguf.consumer import LlamaCpp


class Differences(NamedTuple):
    """Of log-probabilities at all positions.

    Attributes:
        largest: of all tokens.
        positions: that were compared.
        decided: positions whose two most probable tokens are more than ten times ``bound`` apart.
        other_argmax: those of them where llama.cpp's most probable token is another.
        perplexity, own_perplexity: of the sequences, llama.cpp's and the model's.
    """

    largest: float
    positions: int
    decided: int
    other_argmax: int
    perplexity: float
    own_perplexity: float


def differences(server: LlamaCpp, model: Any, sequences: Sequence[Sequence[int]], bound: float) -> Differences:
    """Run both over ``sequences``; ``bound`` is the largest difference that is stated for the format."""
    largest, positions, decided, other = 0.0, 0, 0, 0
    losses, own_losses = [], []
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([list(sequence)])).logits[0].double()
        ours = logits.log_softmax(-1)
        for at in range(1, len(sequence)):
            found = server.log_probabilities(sequence[:at], ours.shape[-1])
            theirs = torch.full_like(ours[0], float("-inf"))
            theirs[torch.tensor(list(found))] = torch.tensor(list(found.values()), dtype=torch.float64)
            largest = max(largest, (theirs - ours[at - 1]).abs().max().item())
            top = ours[at - 1].topk(2)
            if (top.values[0] - top.values[1]).item() > 10 * bound:
                decided += 1
                other += theirs.argmax().item() != top.indices[0].item()
            losses.append(-theirs[sequence[at]])
            own_losses.append(-ours[at - 1, sequence[at]])
            positions += 1
    means = torch.stack(losses).mean(), torch.stack(own_losses).mean()
    return Differences(largest, positions, decided, other, means[0].exp().item(), means[1].exp().item())


def served(folder: Path, context: int = 64) -> LlamaCpp:
    """llama.cpp on the file of an export."""
    return LlamaCpp(folder / "model.gguf", context)
