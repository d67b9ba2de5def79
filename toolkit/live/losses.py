"""Losses of a training client, by the names of Tinker's API: sums over tokens, never means.

With lp the log-probability of a target token now, q the one that it was sampled with, A its advantage, w its weight and
r = exp(lp - q), the loss of a sequence is

    cross_entropy        -sum w lp
    importance_sampling  -sum r A
    ppo                  -sum min(r A, clip(r, low, high) A)                 (Schulman et al., 2017)
    cispo                -sum clip(r, low, high).detach() lp A               (MiniMax-M1, 2025)
    gspo                 -sum min(s_t A, clip(s_t, low, high) A)             (GSPO-token; Zheng et al., 2025)
    dro                  -sum lp A - beta / 2 (lp - q)^2                     (Richemond et al., 2024)

where s_t = s.detach() exp(lp - lp.detach()) and s = exp(mean of lp - q over the tokens M that ``sequence_ratio_mask``
marks), 1 where it marks none: every token has the ratio of its sequence, and the gradient of that token alone.

The thresholds are 0.8 and 1.2, of gspo 1 - 3e-4 and 1 + 4e-4 as in its paper, and beta is 0.05 unless the request says
otherwise.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]

_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_CLIP_SEQUENCE = {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4}


@dataclass(frozen=True)
class Loss:
    """A loss of one sequence.

    Args:
        function: (lp [n], inputs [n] each, config) -> scalar.
        needs: names of the inputs that it reads.
        config: names of its settings, and their values where the request gives none.
        may_lack: inputs that are 1 where a sequence has none.
    """

    function: Callable[[Tensor, Inputs, Config], Tensor]
    needs: tuple[str, ...]
    config: Mapping[str, float] = field(default_factory=dict)
    may_lack: tuple[str, ...] = ()

    def settings(self, name: str, given: Mapping[str, float | str]) -> dict[str, float]:
        """The settings of a request. Raises ToolkitError for one that the loss does not have, or that is no number."""
        for key, value in given.items():
            if key not in self.config:
                raise ToolkitError(must_be_one_of(f"a setting of {name}", key, list(self.config) or ["none"]))
            if isinstance(value, str) or not math.isfinite(value):
                raise ToolkitError(f"loss_fn_config.{key} must be a finite number, got {value!r}.")
        return {**self.config, **{key: float(value) for key, value in given.items()}}


def _ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    return (logprobs - inputs["logprobs"]).exp()


def _clipped(ratio: Tensor, config: Config) -> Tensor:
    return ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


def _cross_entropy(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    return -(inputs["weights"] * logprobs).sum()


def _importance_sampling(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    return -(_ratio(logprobs, inputs) * inputs["advantages"]).sum()


def _ppo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    ratio, advantages = _ratio(logprobs, inputs), inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clipped(ratio, config) * advantages).sum()


def _gspo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    now, marked = logprobs.detach(), inputs["sequence_ratio_mask"] != 0
    log_ratio = torch.where(marked, now - inputs["logprobs"], 0.0).sum() / marked.sum().clamp(min=1)
    ratio, advantages = (log_ratio + logprobs - now).exp(), inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clipped(ratio, config) * advantages).sum()


def _cispo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    weight = _clipped(_ratio(logprobs, inputs), config).detach()
    return -(weight * logprobs * inputs["advantages"]).sum()


def _dro(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    penalty = 0.5 * config["beta"] * (logprobs - inputs["logprobs"]).square()
    return -(logprobs * inputs["advantages"] - penalty).sum()


_OF_SAMPLES = ("logprobs", "advantages")
LOSSES = {
    "cross_entropy": Loss(_cross_entropy, ("weights",), may_lack=("weights",)),
    "importance_sampling": Loss(_importance_sampling, _OF_SAMPLES),
    "ppo": Loss(_ppo, _OF_SAMPLES, _CLIP),
    "cispo": Loss(_cispo, _OF_SAMPLES, _CLIP),
    "gspo": Loss(_gspo, (*_OF_SAMPLES, "sequence_ratio_mask"), _CLIP_SEQUENCE),
    "dro": Loss(_dro, _OF_SAMPLES, {"beta": 0.05}),
}


def loss_named(name: str) -> Loss:
    """The loss of a name. Raises ToolkitError for one that there is not."""
    if name not in LOSSES:
        raise ToolkitError(must_be_one_of("loss_fn", name, list(LOSSES)))
    return LOSSES[name]
