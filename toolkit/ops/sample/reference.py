"""Sampling in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.rowwise import compute_dtype, elementwise, upcast

LEAST_MASS = 2.0**-1022
"""What ``top_p`` is raised to, so that the most probable token is always kept."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words, without leaving int64's positive range."""
    low, high = multiplier * (word & 0xFFFF), multiplier * (word >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011): four words out of four of counter and two of key.

    All are int64 tensors of one shape that hold 32-bit words, 0 to 2**32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniforms(seeds: Tensor, steps: Tensor) -> Tensor:
    """One multiple of 2**-53 in [0, 1) for each seed and step (int64, any shape), float64.

    The top 53 of the first 64 bits of Philox4x32-10 with the seed as key and (step, 0) as counter, low words first.
    """
    counter = (steps & _WORD, (steps >> 32) & _WORD, torch.zeros_like(steps), torch.zeros_like(steps))
    first, second, _, _ = philox(counter, (seeds & _WORD, (seeds >> 32) & _WORD))
    return ((first << 21) | (second >> 11)).double() * 2.0**-53


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids [B] int64 and their log-probabilities [B] float64. A row's bits do not depend on the other rows."""
    rows, vocabulary = logits.shape
    compute_dtype(logits)
    if rows == 0:
        return top_k.new_empty(0), temperature.new_empty(0, dtype=torch.float64)
    logits_64 = logits.double().contiguous()
    best_ids = logits_64.argmax(-1)
    best = logits_64.gather(1, best_ids[:, None])
    hot = (temperature > 0)[:, None]
    scores = logits_64 / torch.where(hot, temperature.double()[:, None], 1.0)
    weights = elementwise(torch.exp, scores - scores.gather(1, best_ids[:, None]))
    # Nothing to filter: the sort below would keep all. Looked up only where that costs no wait for the device.
    if logits.device.type != "cpu" or bool((((top_k > 0) & (top_k < vocabulary)) | (top_p < 1)).any()):
        weights = torch.where(_kept(logits_64, weights, top_k, top_p), weights, 0.0)
    weights = torch.where(weights >= min_p.double()[:, None].clamp_max(1.0), weights, 0.0)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # A uniform is at most 1 - 2**-53, so the product never rounds up to the total, past the last token.
    target = uniforms(seeds, steps)[:, None] * total
    indices = torch.searchsorted(cumulative, target, right=True).clamp_max(vocabulary - 1)
    proper = best.isfinite() & scores.gather(1, best_ids[:, None]).isfinite()
    sampled = hot & proper
    tokens = torch.where(sampled, indices, best_ids[:, None])
    logprobs = torch.where(sampled, (weights.gather(1, indices) / total).log(), torch.where(proper, 0.0, torch.nan))
    return tokens[:, 0], logprobs[:, 0]


def _kept(logits: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Mask [B, V] of what top-k and then top-p leave, given float64 logits and their weights."""
    vocabulary = logits.shape[-1]
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    limit = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary)[:, None]
    among = ordered >= ordered.gather(1, limit - 1)
    mass = torch.where(among, weights.gather(1, ids), 0.0).cumsum(-1)
    before = mass.roll(1, -1)
    before[:, 0] = 0.0
    share = top_p.double()[:, None]
    # A token is in while the mass before it falls short.
    nucleus = (before < share.clamp_min(LEAST_MASS) * mass[:, -1:]) | (share >= 1.0)
    return torch.zeros_like(nucleus).scatter(1, ids, among & nucleus)


def sample_fake(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = torch.empty(logits.shape[:1], dtype=torch.int64, device=logits.device)
    return tokens, torch.empty(logits.shape[:1], dtype=torch.float64, device=logits.device)


def _owners(offsets: Tensor, count: int) -> Tensor:
    """Row [count] that each entry of a flat list belongs to."""
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(count, device=offsets.device), right=True)


def penalize(
    logits: Tensor,
    history: Tensor,
    offsets: Tensor,
    prompt_lengths: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    suppressed: Tensor,
    suppressed_offsets: Tensor,
) -> Tensor:
    """New logits [B, V], float32 (float64 for float64): computed in float64, rounded once."""
    rows, vocabulary = logits.shape
    if not logits.numel():
        return upcast(logits).clone()
    values = logits.double()
    row = _owners(offsets, len(history))
    output = torch.arange(len(history), device=history.device) - offsets[row] >= prompt_lengths[row]

    def count(row: Tensor, tokens: Tensor, increments: Tensor) -> Tensor:
        """Occurrences [B, V]; ids outside the vocabulary go to a column that is cut off."""
        column = torch.where((tokens >= 0) & (tokens < vocabulary), tokens, vocabulary)
        flat = torch.zeros(rows * (vocabulary + 1), dtype=torch.int64, device=logits.device)
        return flat.scatter_add_(0, row * (vocabulary + 1) + column, increments).view(rows, -1)[:, :vocabulary]

    seen = count(row, history, torch.ones_like(history)) > 0
    times = count(row, history, output.long())
    factor = repetition.double()[:, None]
    repeated = torch.where(values > 0, values / factor, values * factor)
    lessened = torch.where(seen, repeated, values)
    penalty = frequency.double()[:, None] * times + presence.double()[:, None]
    lessened = torch.where(times > 0, lessened - penalty, lessened)
    is_suppressed = count(_owners(suppressed_offsets, len(suppressed)), suppressed, torch.ones_like(suppressed)) > 0
    return torch.where(is_suppressed, -torch.inf, lessened).to(compute_dtype(logits))


def penalize_fake(
    logits: Tensor,
    history: Tensor,
    offsets: Tensor,
    prompt_lengths: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    suppressed: Tensor,
    suppressed_offsets: Tensor,
) -> Tensor:
    return torch.empty(logits.shape, dtype=compute_dtype(logits), device=logits.device)
