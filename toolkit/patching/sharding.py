"""Models whose parameters are sharded over processes (ZeRO-3, FSDP2, tensor parallel), and gathering them."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.modules.tensor_parallel import group_of_forward
from toolkit.patching.weights import weights_changed

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def is_shard(parameter: nn.Parameter) -> bool:
    """Whether this process holds only a shard of the parameter."""
    if hasattr(parameter, "ds_numel"):  # set by DeepSpeed on parameters that it partitions
        return bool(parameter.numel() != parameter.ds_numel)
    return hasattr(parameter, "placements")  # a DTensor


def is_sharded(model: nn.Module | None) -> bool:
    """Whether a framework shards parameters of ``model`` and gathers them for its modules' forwards."""
    if model is None:
        return False
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # ZeRO-3
        return True
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def check_unsplit(model: nn.Module, purpose: str) -> None:
    """Raise ToolkitError for a model that tensor parallel has split; it names the first such layer."""
    split = next((path for path, module in model.named_modules() if group_of_forward(module) is not None), None)
    if split is not None:
        raise ToolkitError(
            f"{split} must be gathered for {purpose}, got one that is split over ranks; use `with parallel.gathered():`"
            " of what toolkit.tensor_parallel returned."
        )


def check_unsharded(model: nn.Module, purpose: str) -> None:
    """Check that a framework has left this process all parameters of ``model``.

    Raises:
        ToolkitError: names the first sharded parameter.
    """
    shard = next((name for name, parameter in model.named_parameters() if is_shard(parameter)), None)
    if shard is not None:
        raise ToolkitError(
            f"parameter {shard} must be gathered for {purpose}, got one that is sharded over the processes; use "
            "`with gathered(model):` of train_patches.fsdp or train_patches.deepspeed."
        )


@contextmanager
def gathering(model: nn.Module, framework: str, parameters: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    """Inside, this process has the whole model, and the framework's sharding hooks do not run.

    The weight version changes on entry: gathering writes past torch's version counters.

    Args:
        framework: the package that the hooks come from.
        parameters: contexts that gather parameters, entered in order and left in reverse.
    """
    with ExitStack() as stack:
        for one in parameters:
            stack.enter_context(one)
        stack.enter_context(_without_hooks(model, framework))
        weights_changed(model)
        yield


def gathered_fsdp(model: nn.Module) -> AbstractContextManager[None]:
    """``train_patches.fsdp.gathered``."""
    from torch.distributed.fsdp import FSDPModule

    units = [cast("FSDPModule", module) for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        raise ToolkitError(f"{type(model).__name__} is not sharded; call fully_shard(model) before gathered(model).")
    return gathering(model, "torch.distributed.fsdp", [_unsharded(unit) for unit in units])


@contextmanager
def _unsharded(unit: "FSDPModule") -> Iterator[None]:
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def gathered_zero(model: nn.Module, rewritten: bool = False) -> AbstractContextManager[None]:
    """``train_patches.deepspeed.gathered``.

    Args:
        rewritten: whether what the first process writes to parameters inside stays.
    """
    import deepspeed

    model = getattr(model, "module", model)  # of an engine
    parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        return gathering(model, "deepspeed", [])
    rank = 0 if rewritten else None
    return gathering(model, "deepspeed", [deepspeed.zero.GatheredParameters(parameters, modifier_rank=rank)])


@contextmanager
def _without_hooks(model: nn.Module, framework: str) -> Iterator[None]:
    """Inside, no module has hooks of ``framework``; hooks that are added or removed inside stay so."""
    removed = []
    for module in model.modules():
        for hooks in (
            module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks,
            module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks,
        ):  # fmt: skip
            before = list(hooks.items())
            for number, hook in before:
                if hook.__module__.startswith(framework):
                    del hooks[number]
            if len(hooks) < len(before):
                removed.append((hooks, before, set(hooks)))
    try:
        yield
    finally:
        for hooks, before, kept in removed:
            now = dict(hooks)
            hooks.clear()
            hooks.update({number: hook for number, hook in before if number not in kept or number in now})
            hooks.update(now)
