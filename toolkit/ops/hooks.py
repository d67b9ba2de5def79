"""Which hooks are somebody's, to see or to change values, and which are a framework's way of working."""

from typing import Any

from torch import nn


def of_deepspeed(hook: Any) -> bool:
    """Whether a hook is DeepSpeed's: it gathers parameters or counts calls, and reads no value.

    DeepSpeed puts hooks on every module, those without parameters too, and on outputs.
    """
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def watched(module: nn.Module) -> bool:
    """Whether a module has forward hooks that must see its calls."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(map(of_deepspeed, hooks))
