"""Models whose parameters a host keeps in parts, a part a process (ZeRO-3, FSDP2): what else needs them whole."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.patching.weights import weights_changed


def is_part(parameter: nn.Parameter) -> bool:
    """Whether this process holds no more than a part of the parameter's numbers."""
    if hasattr(parameter, "ds_numel"):  # DeepSpeed's mark of what it partitions
        return parameter.numel() != parameter.ds_numel
    return hasattr(parameter, "placements")  # a DTensor


def is_sharded(model: nn.Module | None) -> bool:
    """Whether a host keeps parameters of ``model`` in parts, and gathers them for its modules' forwards."""
    if model is None:
        return False
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # ZeRO-3
        return True
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def check_whole(model: nn.Module, purpose: str) -> None:
    """ToolkitError, which names the first parameter of ``model`` that is not whole, unless all are."""
    part = next((name for name, parameter in model.named_parameters() if is_part(parameter)), None)
    if part is not None:
        raise ToolkitError(
            f"parameter {part} is sharded over the processes; {purpose} is allowed inside of `with gathered(model):` "
            "of train_patches.fsdp or train_patches.deepspeed."
        )


@contextmanager
def gathering(model: nn.Module, host: str, parameters: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    """Inside of the block the model is whole in this process, and the hooks by which ``host`` shards it do not run.

    host: the package that the hooks come from. parameters: contexts that gather parameters, entered in order and left
    in reverse. The weight version moves on entry: gathering writes past torch's version counters.
    """
    with ExitStack() as stack:
        for one in parameters:
            stack.enter_context(one)
        stack.enter_context(_without_hooks(model, host))
        weights_changed(model)
        yield


@contextmanager
def _without_hooks(model: nn.Module, host: str) -> Iterator[None]:
    """Forward hooks of ``host`` set aside, in every module; those that are added or removed meanwhile stay so."""
    aside = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks):
            before = list(hooks.items())
            for number, hook in before:
                if hook.__module__.startswith(host):
                    del hooks[number]
            if len(hooks) < len(before):
                aside.append((hooks, before, set(hooks)))
    try:
        yield
    finally:
        for hooks, before, kept in aside:
            now = dict(hooks)
            hooks.clear()
            hooks.update({number: hook for number, hook in before if number not in kept or number in now})
            hooks.update(now)
