"""Drawing tokens from logits, and the penalties that come before it."""

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
    triton="toolkit.ops.sample.triton.sample",
)
_PENALIZE = register(
    "penalize(Tensor logits, Tensor history, Tensor offsets, Tensor prompt_lengths, Tensor repetition,"
    " Tensor frequency, Tensor presence, Tensor barred, Tensor barred_offsets) -> Tensor",
    reference=reference.penalize,
    fake=reference.penalize_fake,
    triton="toolkit.ops.sample.triton.penalize",
)


def _check(logits: Tensor, **columns: tuple[Tensor, int, torch.dtype | None]) -> None:
    """ToolkitError unless logits are [B, V] and each column has its length and dtype (None: float32 or float64)."""
    if logits.dim() != 2 or not logits.shape[1]:
        raise ToolkitError(f"logits have shape {list(logits.shape)}; allowed is [B, V] with V at least 1.")
    compute_dtype(logits)
    for name, (column, length, dtype) in columns.items():
        if column.shape != (length,):
            raise ToolkitError(
                f"{name} has shape {list(column.shape)}; logits of shape {list(logits.shape)} need [{length}]."
            )
        allowed = (torch.float32, torch.float64) if dtype is None else (dtype,)
        if column.dtype not in allowed:
            names = " and ".join(str(one).removeprefix("torch.") for one in allowed)
            raise ToolkitError(f"{name} has dtype {column.dtype}; allowed is {names}.")


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
    """One token a row, and its log-probability under the distribution that it was drawn from.

    Row by row, in this order, with x the logits and T the temperature:

    - T = 0: the lowest id among the largest logits, with log-probability 0. Nothing below applies.
    - top-k (0, negative, or V and more: off): the k largest logits, and whatever equals the k-th.
    - weights ``w = exp(x/T - max(x/T))``, 0 for what is out.
    - top-p (1 and more: off): the fewest likeliest tokens that reach ``top_p`` of the sum of w; likelier is the larger
      logit, of equals the lower id. A token is in while the weights before it fall short. The likeliest is always in.
    - min-p (0: off): w of at least ``min_p`` (the largest w is 1).
    - The token is the first, in order of ids, at which the running sum of w exceeds ``u`` times their total, and its
      log-probability ``log(w / total)``: a token without weight is never drawn.
    - ``u`` is 53 bits of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) with key ``seeds`` and counter
      ``(steps, 0)``: a function of (seed, step) alone.

    logits: [B, V], V >= 1; float32, float64, bfloat16 or float16; not modified. temperature, top_p, min_p: [B]
    float32 or float64. top_k, seeds, steps: [B] int64, of which seed and step are read as 64 unsigned bits.
    Returns tokens [B] int64 and log-probabilities [B] float64, in nats. A row without a distribution (NaN, +inf, all
    -inf, or a temperature that takes it there) gives NaN and the id of its first NaN, else of its first largest.

    Precision: every implementation divides, exponentiates and sums in float64, and selects by comparing the logits
    themselves, which has one answer. They differ in the last bits of exp and in the order of sums, some 1e-14 of the
    total at V = 150,000; so they draw the same token but for a uniform, or keep the same tokens but for a ``top_p`` or
    ``min_p``, within that of an edge, once in some 1e9 draws. Each has a fixed order, set by V alone: a row's
    token and log-probability depend on that row's inputs alone, bit for bit, on any device and number of threads.
    Not differentiable; saves nothing. Errors: ToolkitError for other shapes and dtypes; float64 logits in Triton.
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
    barred: Tensor,
    barred_offsets: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Logits after the penalties of each row's own tokens, and -inf where a token is barred.

    ``y = x / repetition`` if x > 0 else ``x * repetition`` for tokens anywhere in the row's history; then ``y -
    (frequency * count + presence)`` for those in its output, count times; then -inf for barred ones.

    logits: [B, V], V >= 1; float32, float64, bfloat16 or float16; not modified. history: [N] int64, the tokens of all
    rows one after another, prompt first; row b's are ``offsets[b]`` to ``offsets[b + 1]``, of which the first
    ``prompt_lengths[b]`` are prompt (offsets [B + 1] and prompt_lengths [B] int64). barred [M] and barred_offsets
    [B + 1] int64: likewise. repetition (above 0), frequency, presence: [B] float32 or float64. Token ids outside 0 to
    V - 1 are passed over. Returns new [B, V], float32 (float64 for float64 logits).
    Computed in float64 and rounded once: every implementation gives the same bits. Not differentiable.
    Errors: ToolkitError for other shapes and dtypes; float64 logits in Triton. Source: CTRL (Keskar et al., 2019) for
    the repetition penalty; the other two are those of the OpenAI API.
    """
    rows = logits.shape[0] if logits.dim() else 0
    columns: dict[str, tuple[Tensor, int, torch.dtype | None]] = {
        "history": (history, history.numel(), torch.int64),
        "offsets": (offsets, rows + 1, torch.int64),
        "prompt_lengths": (prompt_lengths, rows, torch.int64),
        "repetition": (repetition, rows, None),
        "frequency": (frequency, rows, None),
        "presence": (presence, rows, None),
        "barred": (barred, barred.numel(), torch.int64),
        "barred_offsets": (barred_offsets, rows + 1, torch.int64),
    }
    _check(logits, **columns)
    return _PENALIZE.select(impl)(
        logits, history, offsets, prompt_lengths, repetition, frequency, presence, barred, barred_offsets
    )
