"""The configurations by which modules choose their attention implementation: a text model's, a tower's; and experts.

transformers reads the choice from a module's ``config`` at every call; towers of one model have configurations of their
own. ``set_attn_implementation`` of a model writes all of them, so it is not used here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from toolkit.patching.claim import Undo

FIELD = "_attn_implementation_internal"
"""Where a configuration keeps its implementation, without those of the configurations inside it."""
EXPERTS_FIELD = "_experts_implementation_internal"
"""Where it keeps that of its experts."""


def attention_configs(model: nn.Module) -> list[Any]:
    """Every configuration of ``model``'s modules, and those inside them, each once."""
    found: dict[int, Any] = {}
    waiting = [module.__dict__["config"] for module in model.modules() if "config" in module.__dict__]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found and hasattr(config, FIELD):
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


@contextmanager
def eager_modules(model: nn.Module, fields: Sequence[str] = (FIELD, EXPERTS_FIELD)) -> Iterator[None]:
    """Inside, every module of ``model`` runs its eager attention and experts: torch's grouped GEMM has no float64.

    Args:
        fields: of the configurations, which name the implementations that change.
    """
    configs = attention_configs(model)
    before = [(one, name, getattr(one, name)) for one in configs for name in fields if hasattr(one, name)]
    try:
        for config, name, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, name, implementation in before:
            setattr(config, name, implementation)


def configs_of_layer(model: nn.Module, path: str) -> list[Any]:
    """Of the layer at ``path``: its configuration, and the one that its masks are made by, where that is another."""
    own = model.get_submodule(path).config
    parents = [path.rsplit(".", count)[0] for count in range(1, path.count(".") + 1)]
    around = (model.get_submodule(parent) for parent in [*parents, ""])
    maker = next((module.config for module in around if isinstance(module, PreTrainedModel)), own)
    return [own] if maker is own else [own, maker]


def modules_beside(model: nn.Module, callers: set[nn.Module]) -> dict[int, list[nn.Module]]:
    """Modules that may call the attention interface beside ``callers``, by the id of their configuration."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and module not in callers and not isinstance(module, PreTrainedModel):
            found.setdefault(id(config), []).append(module)
    return found


def set_implementation(config: Any, field: str, name: str) -> Undo:
    """The undo step, after setting one configuration's implementation, and none of those inside it.

    Undoing leaves an implementation alone that somebody else has set since.
    """
    before = getattr(config, field)
    setattr(config, field, name)
    return partial(_put_back, config, field, name, before)


def _put_back(config: Any, field: str, name: str, before: Any) -> None:
    if getattr(config, field) == name:
        setattr(config, field, before)
