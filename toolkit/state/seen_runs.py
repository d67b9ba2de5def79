"""Ordinary calls in which every query sees one run of keys, by an explicit mask: the batch that says the same.

Masks of this form: causal, windows, chunks, packed sequences, spans of pictures that see each other, encoders with
padding, block-diagonal ones.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings
from toolkit.state.dense import DenseContext


class SeenRuns(DenseContext):
    """``batch.spans`` are, unlike elsewhere, all the keys that a query sees: a layer's window is not looked at."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        return super().attend(layer, q, k, v, settings._replace(window=1))

    def seen_ahead(self, layer: int) -> Tensor | None:
        return self.batch.spans


def context_of_mask(mask: Tensor) -> SeenRuns:
    """The context of a boolean mask [B, 1, S, S], true where a query sees a key; one that sees none gives zeros.

    Reads the mask on the host once, so make it once per forward.

    Raises:
        ToolkitError: for a mask of another shape or dtype, or whose queries see other than one run of keys.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        raise ToolkitError(f"mask must be boolean of shape [B, 1, S, S], got {mask.dtype} {list(mask.shape)}.")
    with torch.inference_mode(False), torch.no_grad():
        seen, length = mask.detach()[:, 0].to(torch.uint8), mask.shape[3]
        count = seen.sum(-1, dtype=torch.int64)
        first = seen.argmax(-1) if length else count
        end = length - seen.flip(-1).argmax(-1) if length else count
        first, end = torch.where(count > 0, first, 0), torch.where(count > 0, end, 0)
        if bool((end - first != count).any()):
            raise ToolkitError("mask must let each query see one run of keys, got one with a hole.")
        found = torch.stack([first, end], 2).cpu().numpy()
    return _context(found, length, mask.device)


def all_seen(rows: int, queries: int, keys: int, window: int = 0, device: torch.device | None = None) -> SeenRuns:
    """The context of ``rows`` calls of ``queries``, the last of their row's ``keys``, that see all of them.

    Args:
        window: query i sees key j where |i - j| < window; 0 for all.
    """
    runs = np.zeros((rows, queries, 2), dtype=np.int64)
    runs[..., 1] = keys
    if window:
        position = np.arange(keys - queries, keys)
        runs[..., 0] = np.maximum(position - window + 1, 0)
        runs[..., 1] = np.minimum(position + window, keys)
    return _context(runs, keys, device)


def _context(runs: np.ndarray, keys: int, device: torch.device | None) -> SeenRuns:
    """Of runs [B, S, 2], (first, end) among the ``keys`` of the query's row; (0, 0) for none."""
    segments, spans = [], runs.copy()
    for row, own in enumerate(runs):
        for start, stop, first, length in _segments(own, keys):
            segments.append((stop - start, row * keys + first, length))
            if length:
                spans[row, start:stop] -= first
    counts, kv_offsets, kv_lengths = np.array(segments, dtype=np.int64).reshape(-1, 3).T
    queries = runs.shape[0] * runs.shape[1]
    # Plain tensors even inside inference mode: callers keep contexts, and a later backward saves them.
    with torch.inference_mode(False), torch.no_grad():
        parts = (
            np.full(queries, -1),
            np.zeros(queries),
            np.concatenate([[0], counts.cumsum()]),
            kv_offsets,
            kv_lengths,
        )
        tensors = [torch.from_numpy(part.astype(np.int64)).to(device) for part in parts]
        batch = RaggedBatch(*tensors)  # type: ignore[arg-type]
        return SeenRuns(replace(batch, spans=torch.from_numpy(spans.reshape(-1, 2)).to(device)))


def _segments(runs: np.ndarray, keys: int) -> list[tuple[int, int, int, int]]:
    """(first query, end query, first key, number of keys) of chunks of a row, of whose keys the queries are the last.

    Queries that see themselves stay together as far as they see each other. Others (padding, cross-attention) see one
    run all: at most as many queries as keys are a chunk.
    """
    first, end = runs.T
    query = np.arange(len(runs))
    own = (first <= query) & (query < end) & (keys == len(runs))
    new = np.ones(len(runs), dtype=bool)
    apart = (first[1:] != first[:-1]) | (end[1:] != end[:-1])
    done = (end[:-1] <= query[1:]) & (query[1:] <= first[1:])
    new[1:] = np.where(own[1:] & own[:-1], done, apart | own[1:] | own[:-1])
    starts = np.flatnonzero(new).tolist()
    chunks: list[tuple[int, int, int, int]] = []
    for start, stop in zip(starts, [*starts[1:], len(runs)]):
        low, high = int(first[start]), int(end[start])
        if own[start]:
            rise = np.diff(first[start:stop]).min(initial=0) >= 0 and np.diff(end[start:stop]).min(initial=0) >= 0
            if not rise or end[stop - 1] > stop:
                raise ToolkitError("mask must let queries see runs of keys in order, got one that falls.")
            chunks.append((start, stop, low, stop - low))
        elif low == high:
            chunks.append((start, stop, 0, 0))
        else:
            step = high - low
            chunks += [(at, min(at + step, stop), low, step) for at in range(start, stop, step)]
    return chunks
