"""Held-out bits per byte, and those of gzip and xz on the same text."""

import gzip
import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.ops.token_logprob import token_logprob
from toolkit.packing import in_batches
from toolkit.state.batch import RaggedBatch
from toolkit.training.progress import counted

Forward = Callable[[RaggedBatch, Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """Inputs of one forward over part of a document, and the targets of its last ``len(targets)`` rows."""

    inputs: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Score:
    """Sum of -log2 p over the tokens of some documents, and what they encode."""

    bits: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


def windows(ids: Sequence[int], start_id: int, max_length: int, overlap: int) -> Iterator[Window]:
    """Split a document so that each of its tokens is a target exactly once.

    The first token is conditioned on ``start_id``, every other on what precedes it in its window; windows
    after the first repeat at least ``overlap`` earlier tokens as context (0 <= overlap < max_length).
    """
    row = [start_id, *ids]
    done = 0  # tokens of ids that have been targets
    while done < len(ids):
        first = max(done - overlap, 0)
        last = min(first + max_length, len(ids))
        yield Window(list(row[first:last]), list(ids[done:last]))
        done = last


@torch.no_grad()
def score_windows(
    forward: Forward, split: Sequence[Window], batch_tokens: int, device: torch.device | None = None
) -> float:
    """Sum of -log2 p over all targets. ``forward(batch, rows)`` gives the logits of those rows.

    Windows are packed up to ``batch_tokens`` rows per forward (at least one window).
    """
    bits = 0.0
    packs = in_batches(split, lambda window: len(window.inputs), batch_tokens)
    for pack in counted(packs, len(packs), "held out: forwards"):
        batch = RaggedBatch.from_sequences([window.inputs for window in pack], device=device, share=False)
        ends = batch.query_offsets[1:].tolist()
        rows = torch.cat([torch.arange(end - len(w.targets), end) for w, end in zip(pack, ends)]).to(device)
        targets = torch.tensor([token for window in pack for token in window.targets], device=device)
        logprobs, _ = token_logprob(forward(batch, rows), targets)
        bits -= logprobs.double().sum().item() / math.log(2)
    return bits


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of ``gzip -9`` and ``xz -9`` on ``text``, headers included."""
    return {
        "gzip -9": len(gzip.compress(text, 9, mtime=0)) * 8 / len(text),
        "xz -9": len(lzma.compress(text, preset=9)) * 8 / len(text),
    }
