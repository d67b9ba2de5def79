"""What a layer that writes its attention out does to its scores: recorded in one call, and read as a ``Plan``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.modules.attention_scores import HIDDEN, Scores, UnknownStep
from toolkit.modules.written_attention import Plan, Watch, heads


@dataclass(frozen=True)
class Trace:
    """One attention of a call: factor and bias [N, T, T] of its scores, keys [T, G, D] and values [T, G, Dv]."""

    factor: Tensor
    bias: Tensor
    keys: Tensor
    values: Tensor

    def plan(self) -> Plan:
        """Raises UnknownStep where this is not causal attention, with a window or ALiBi at most."""
        count = len(self.factor)
        visible = (self.bias > HIDDEN) & (self.factor != 0.0)
        if not bool((visible == visible[0]).all()):
            raise UnknownStep("its heads have different masks")
        scale = float(self.factor[0, 0, 0])
        if not torch.allclose(self.factor[visible], torch.full((), scale, dtype=self.factor.dtype), rtol=1e-6):
            raise UnknownStep("its scores have a factor that is not the same for all tokens")
        key_heads = self.keys.shape[1]
        if count % key_heads or self.values.shape[1] != key_heads:
            raise UnknownStep(
                f"it has {count} query heads, {key_heads} key heads and {self.values.shape[1]} value heads"
            )
        key_heads = _distinct_heads(self.keys, self.values)
        window, chunked = _window(visible[0])
        slopes = _slopes(self.bias, visible[0])
        if slopes is not None and chunked:
            raise UnknownStep("it has ALiBi and chunks at once")
        return Plan(scale, window, slopes, key_heads, chunked)


def _window(visible: Tensor) -> tuple[int, bool]:
    """Of a mask [T, T]: the tokens that a query sees, 0 for all, and whether they are its chunk."""
    at = torch.arange(len(visible), device=visible.device)
    age = at[:, None] - at
    seen = int(visible[-1].sum())
    for window in (0, seen):
        if torch.equal(visible, (age >= 0) & (age < window if window else True)):
            return window, False
    size = int(visible[:, 0].sum())  # the queries that see the first key
    if size and torch.equal(visible, (age >= 0) & (at[:, None] // size == at // size)):
        return size, True
    raise UnknownStep("its mask is neither causal nor a sliding window nor chunks")


def _slopes(bias: Tensor, visible: Tensor) -> tuple[float, ...] | None:
    """Of ALiBi, from the bias [N, T, T]; None where there is none. What all keys of a query share changes nothing."""
    length = bias.shape[-1]
    bias = bias.double()
    last = bias[:, -1]
    steps = torch.where(visible[-1, 1:] & visible[-1, :-1], last.diff(dim=-1), torch.nan)
    # Where the numbers are smallest their difference is the most precise.
    sizes = torch.maximum(last[:, 1:].abs(), last[:, :-1].abs()).masked_fill(steps.isnan(), torch.inf)
    slopes = steps.gather(1, sizes.argmin(1, keepdim=True))
    at = torch.arange(length, device=bias.device, dtype=bias.dtype)
    rest = bias - slopes[..., None] * at - (bias.diagonal(dim1=-2, dim2=-1) - slopes * at)[..., None]
    largest = float(bias.masked_fill(~visible, 0.0).abs().amax().clamp_min(1.0))
    if not float(rest.masked_fill(~visible, 0.0).abs().amax()) <= 1e-6 * largest:
        raise UnknownStep("its scores have a bias that is not ALiBi, the same for equal distances")
    return tuple(slopes[:, 0].tolist()) if bool(slopes.any()) else None


def _distinct_heads(keys: Tensor, values: Tensor) -> int:
    """Heads of keys and values [T, G, D] without those that repeat the one before."""
    count = keys.shape[1]
    for distinct in range(1, count):
        each = count // distinct
        if count % distinct == 0 and all(
            torch.equal(x, x[:, ::each].repeat_interleave(each, 1)) for x in (keys, values)
        ):
            return distinct
    return count


class TraceWatch(Watch):
    """Computes attention as the layer does, and keeps a ``Trace`` of each."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.traces: list[Trace] = []

    def start(self, q: Tensor, k: Tensor) -> Scores:
        scores = super().start(q, k)
        ones = torch.ones(scores.shape, device=q.device)
        return scores.replaced(factor=ones, bias=torch.zeros_like(ones))

    def weighted_sum(self, scores: Scores, values: Tensor) -> Tensor:
        assert scores.factor is not None
        assert scores.bias is not None
        k, v = heads(scores.k), heads(values)
        factor, bias = (part.reshape(-1, *part.shape[-2:]) for part in (scores.factor, scores.bias))
        self.traces.append(Trace(factor, bias, k, v))
        q = heads(scores.q).transpose(0, 1)
        k, v = (part.transpose(0, 1).repeat_interleave(len(q) // part.shape[1], 0) for part in (k, v))
        weights = (factor * (q @ k.mT) + bias).softmax(-1)
        return (weights @ v).reshape(*scores.shape[:-1], -1)
