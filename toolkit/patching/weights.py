"""The weight version: a number that changes whenever a parameter is written."""

import itertools
import sys
import weakref
from functools import cache
from typing import Any

from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from toolkit.patching.adapters import adapter_layers, adapter_state, inner_model

_WATCHED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def count_writes(model: nn.Module) -> None:
    """Make torch's version counters of ``model``'s parameters count steps of optimizers that write past them."""
    _WATCHED.add(model)
    _count_steps()


@cache
def _count_steps() -> None:
    def stepped(optimizer: Optimizer, *_: Any) -> None:
        copies = False
        for group in optimizer.param_groups:
            copies = copies or not all(isinstance(parameter, nn.Parameter) for parameter in group["params"])
            if group.get("fused"):
                increment_version([parameter for parameter in group["params"] if parameter.grad is not None])
        # DeepSpeed's optimizers step flat copies and write them back past the counters; the model is unknown here.
        if copies and "deepspeed" in sys.modules:
            for model in list(_WATCHED):
                increment_version([parameter for parameter in model.parameters() if parameter.requires_grad])

    register_optimizer_step_post_hook(stepped)


class WeightClock:
    """The weight version of one model, from torch's in-place version counters of its parameters.

    An optimizer step (DeepSpeed's too), ``load_state_dict``, any in-place operation, and another choice of active
    adapters change it. Writes past the counters (``parameter.data.copy_``) do not: call ``weights_changed(model)``
    after those.
    """

    def __init__(self, model: nn.Module) -> None:
        count_writes(model)
        self._model = weakref.ref(model)
        self._next = itertools.count(1)
        self.refresh()
        self._value, self._stamp = 0, self._read()

    def refresh(self) -> None:
        """Read again which parameters the model has, after some were replaced."""
        model = self._model()
        self._parameters = list(model.parameters()) if model is not None else []
        self._adapters = adapter_layers(model) if model is not None else []

    def _read(self) -> tuple[int, int, int]:
        versions = addresses = 0
        for parameter in self._parameters:
            versions += parameter._version
            addresses ^= getattr(
                parameter, "_local_tensor", parameter
            ).data_ptr()  # a DTensor's is that of its local shard
        return versions, addresses, adapter_state(self._adapters)

    def version(self) -> int:
        """The current version."""
        stamp = self._read()
        if stamp != self._stamp:
            self._stamp, self._value = stamp, next(self._next)
        return self._value

    def move(self) -> None:
        """Change the version by hand."""
        self._value = next(self._next)


_CLOCKS: "weakref.WeakKeyDictionary[nn.Module, WeightClock]" = weakref.WeakKeyDictionary()


def weight_clock(model: nn.Module) -> WeightClock:
    """The clock of ``model``: the same one for every caller."""
    model = inner_model(model)
    clock = _CLOCKS.get(model)
    if clock is None:
        clock = _CLOCKS[model] = WeightClock(model)
    return clock


def weight_version(model: nn.Module) -> int:
    """0 at the first call for a model; another number after every write to a parameter."""
    return weight_clock(model).version()


def weights_changed(model: nn.Module) -> None:
    """Change the weight version by hand, after writes that torch's version counters do not see."""
    clock = weight_clock(model)
    clock.refresh()
    clock.version()
    clock.move()
