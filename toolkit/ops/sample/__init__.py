"""Sampling tokens from logits, and the penalties that come before it."""

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.registry import register
from toolkit.ops.rowwise import compute_dtype
from toolkit.ops.sample import reference

_SAMPLE = register(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor steps)"
    " -> (Tensor, Tensor)",
    reference=reference.sample,
    fake=reference.sample_fake,
    triton="toolkit.ops.sample.triton_sample.sample",
)
_PENALIZE = register(
    "penalize(Tensor logits, Tensor history, Tensor offsets, Tensor prompt_lengths, Tensor repetition,"
    " Tensor frequency, Tensor presence, Tensor suppressed, Tensor suppressed_offsets) -> Tensor",
    reference=reference.penalize,
    fake=reference.penalize_fake,
    triton="toolkit.ops.sample.triton.penalize",
)


def _check(logits: Tensor, **columns: tuple[Tensor, int, torch.dtype | None]) -> None:
    """ToolkitError unless logits are [B, V] and each column has its length and dtype (None: float32 or float64)."""
    if logits.dim() != 2 or not logits.shape[1]:
        raise ToolkitError(f"logits must have shape [B, V] with V >= 1, got {list(logits.shape)}.")
    compute_dtype(logits)
    for name, (column, length, dtype) in columns.items():
        if column.shape != (length,):
            raise ToolkitError(
                f"{name} must have shape [{length}] for logits of shape {list(logits.shape)}, got {list(column.shape)}."
            )
        allowed = (torch.float32, torch.float64) if dtype is None else (dtype,)
        if column.dtype not in allowed:
            names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
            raise ToolkitError(f"{name} must have dtype {names}, got {column.dtype}.")


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability under the distribution that it was sampled from.

    Row by row, in this order, with x the logits and T the temperature:

    - T = 0: the lowest id among the largest logits, with log-probability 0. Nothing below applies.
    - top-k (0, negative, or >= V: off): the k largest logits, and every tie with the k-th.
    - weights ``w = exp(x/T - max(x/T))``, 0 for what is filtered.
    - top-p (>= 1: off): the fewest most probable tokens that reach ``top_p`` of the sum of w; ties by ascending id. A
      token is kept while the weights before it fall short. The most probable token is always kept.
    - min-p (0: off): w of at least ``min_p`` (the largest w is 1).
    - The token is the first, in order of ids, at which the running sum of w exceeds ``u`` times their total, and its
      log-probability ``log(w / total)``: a token without weight is never sampled.
    - ``u`` is 53 bits of Philox4x32-10 with key ``seeds`` and counter ``(steps, 0)``: a function of (seed, step) alone.

    Args:
        logits: [B, V], V >= 1; float32, float64, bfloat16 or float16; not modified.
        temperature, top_p, min_p: [B] float32 or float64.
        top_k: [B] int64.
        seeds, steps: [B] int64, read as 64 unsigned bits.

    Returns:
        Tokens [B] int64 and log-probabilities [B] float64, in nats. A row without a distribution (NaN, +inf, all -inf,
        or a temperature that takes it there) gives NaN and the id of its first NaN, else of its first largest.

    Raises:
        ToolkitError: for other shapes and dtypes; float64 logits in Triton.

    Numerics: every implementation divides, exponentiates and sums in float64, and selects by comparing the logits
    themselves, which has one answer. They differ in the last bits of exp and in the order of sums, some 1e-14 of the
    total at V = 150,000; so they sample the same token but for a uniform, or keep the same tokens but for a ``top_p``
    or ``min_p``, within that of an edge, once in some 1e9 samples. Each has a fixed order, set by V alone:
    batch-invariant on any device and number of threads. Not differentiable.
    Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
    """
    rows = logits.shape[0] if logits.dim() else 0
    columns: dict[str, tuple[Tensor, int, torch.dtype | None]] = {
        "temperature": (temperature, rows, None),
        "top_k": (top_k, rows, torch.int64),
        "top_p": (top_p, rows, None),
        "min_p": (min_p, rows, None),
        "seeds": (seeds, rows, torch.int64),
        "steps": (steps, rows, torch.int64),
    }
    _check(logits, **columns)
    return _SAMPLE.select(impl)(logits, temperature, top_k, top_p, min_p, seeds, steps)


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
    *,
    impl: str | None = None,
) -> Tensor:
    """Logits after the penalties of each row's previous tokens, and -inf where a token is suppressed.

    ``y = x / repetition`` if x > 0 else ``x * repetition`` for tokens anywhere in the row's history; then ``y -
    (frequency * count + presence)`` for those in its output, count times; then -inf for suppressed ones.

    Args:
        logits: [B, V], V >= 1; float32, float64, bfloat16 or float16; not modified.
        history: [N] int64, the tokens of all rows one after another, prompt first. Ids outside 0 to V - 1 are ignored.
        offsets: [B + 1] int64; row b's tokens are ``offsets[b]`` to ``offsets[b + 1]``.
        prompt_lengths: [B] int64; the first so many tokens of a row are prompt.
        repetition: [B] float32 or float64, > 0.
        frequency, presence: [B] float32 or float64.
        suppressed: [M] int64, the suppressed tokens of all rows one after another.
        suppressed_offsets: [B + 1] int64.

    Returns:
        [B, V], float32 (float64 for float64 logits), new.

    Raises:
        ToolkitError: for other shapes and dtypes; float64 logits in Triton.

    Numerics: computed in float64 and rounded once; every implementation is bitwise identical. Not differentiable.
    Source: Keskar et al., "CTRL" (2019) for the repetition penalty; the other two are those of the OpenAI API.
    """
    rows = logits.shape[0] if logits.dim() else 0
    columns: dict[str, tuple[Tensor, int, torch.dtype | None]] = {
        "history": (history, history.numel(), torch.int64),
        "offsets": (offsets, rows + 1, torch.int64),
        "prompt_lengths": (prompt_lengths, rows, torch.int64),
        "repetition": (repetition, rows, None),
        "frequency": (frequency, rows, None),
        "presence": (presence, rows, None),
        "suppressed": (suppressed, suppressed.numel(), torch.int64),
        "suppressed_offsets": (suppressed_offsets, rows + 1, torch.int64),
    }
    _check(logits, **columns)
    return _PENALIZE.select(impl)(
        logits, history, offsets, prompt_lengths, repetition, frequency, presence, suppressed, suppressed_offsets
    )
