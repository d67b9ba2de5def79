"""Steps of optimizers, counted as writes."""

import sys
import weakref
from functools import cache
from typing import Any

from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_WATCHED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_steps_of_copies = 0


def count_steps(model: nn.Module) -> None:
    """Count steps of optimizers in torch's version counters of ``model``'s parameters from now on.

    A fused step, or one through raw pointers (bitsandbytes), moves no counter; here a step of any class moves those of
    the parameters that it holds.
    """
    _WATCHED.add(model)
    _hook_steps()


def steps_of_copies() -> int:
    """How many steps optimizers made on tensors that are not parameters, such as master weights.

    They write them back to parameters, past the counters perhaps, and perhaps of any model.
    """
    return _steps_of_copies


@cache
def _hook_steps() -> None:
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    global _steps_of_copies
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_copies = not all(isinstance(parameter, nn.Parameter) for parameter in held)
    _steps_of_copies += of_copies
    # DeepSpeed steps flat copies of what is trained, and deferred logits go by the counters alone.
    of_all = of_copies and "deepspeed" in sys.modules
    ids = set(map(id, held))
    for model in list(_WATCHED):
        written = [one for one in model.parameters() if id(one) in ids or (of_all and one.requires_grad)]
        increment_version([one for one in written if not one.is_inference()])
