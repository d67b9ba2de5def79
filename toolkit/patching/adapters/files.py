"""Adapters that come into a model while it runs, and go: from a PEFT folder, out of the model, and back.

PEFT makes the wrappers, so that training, saving and merging know them. What comes in does not become active.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.errors import ToolkitError, first_line
from toolkit.modules.tensor_parallel import group_of_model
from toolkit.ops.collectives import group_of, num_ranks, share
from toolkit.patching.adapters.find import adapter_layers, adapter_parts, is_adapter
from toolkit.sentences import shown
from toolkit.whole_shapes import whole_shapes

Parts = list[tuple[Any, str, Any]]
"""(module, attribute of it that is a mapping by adapter, what the mapping has)."""
_NEEDED = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None, "layer_replication": None}


def internal_name(name: str) -> str:
    """``name`` as a key of PEFT's modules, which have no dots."""
    return name.replace("%", "%25").replace(".", "%2E")


def load_adapter(model: nn.Module, name: str, folder: str | Path, kept: Iterable[Parts] = ()) -> None:
    """Put the adapter of a PEFT folder into ``model`` under ``name``, not active.

    Args:
        model: the model inside a ``PeftModel``, or one without adapters.
        name: of ``internal_name``, which no other adapter has.
        folder: with adapter_config.json and adapter_model.safetensors.
        kept: as for ``remove_adapter``.

    Raises:
        ToolkitError: the folder is not read, or is no LoRA of this model. The model is as it was then.
    """
    config, tensors = read_adapter(folder)
    if config.use_dora and group_of_model(model) is not None:
        raise ToolkitError(
            f"adapter {shown(str(folder))} must have use_dora false for a model that is split over ranks, got true."
        )
    tensors = _without_base(model, tensors, folder)
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    old: dict[nn.Module, Any] = {module: module._active_adapter for module in _switches(model)}
    active: Any = next(iter(old.values()), [])
    configs = dict(getattr(model, "peft_config", {}))
    known, before = getattr(model, "peft_config", None), set(adapter_parts(model))
    with _unchanged_gradients(model):
        try:
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
            found: Any = set_peft_model_state_dict(model, tensors, name, low_cpu_mem_usage=True)
            missing = [path for path, tensor in model.named_parameters() if tensor.is_meta]
            wrong = [*found.unexpected_keys, *missing]
            if wrong:
                raise ToolkitError(f"its tensors must be those of its target modules, but {wrong[0]} is not")
            _cast(model, name)
            for part in set(adapter_parts(model)) - before:
                part.training = model.training  # what PEFT adds is in train mode
        except Exception as problem:
            remove_adapter(model, name, kept)
            reason = first_line(problem).rstrip(".")
            raise ToolkitError(f"adapter {shown(str(folder))} must be LoRA of this model ({reason}).") from None
        finally:
            for module in _switches(model):
                module._active_adapter = old.get(module, active)
            if known is None:
                model.__dict__.pop("peft_config", None)
            else:
                known.clear()
                known.update(configs)
                model.peft_config = known
    for _, _, part in parts_of(model, name):
        for tensor in _parameters(part):
            tensor.requires_grad_(False)


def read_adapter(folder: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder. Raises ToolkitError where it is no plain LoRA or DoRA."""
    if not isinstance(folder, str | Path):
        raise ToolkitError(f"adapter must be the path of a folder, got {shown(folder)}.")
    path = Path(folder)
    weights = path / "adapter_model.safetensors"
    for file in (path / "adapter_config.json", weights):
        if not os.path.isfile(file):  # false for what is no path at all
            raise ToolkitError(f"adapter {shown(str(folder))} must be a folder with {file.name}, got none.")
    from peft import LoraConfig, PeftConfig
    from safetensors.torch import load_file

    try:
        config, tensors = PeftConfig.from_pretrained(str(path)), load_file(weights)
    except Exception as problem:
        raise ToolkitError(f"adapter {shown(str(folder))} must be readable ({first_line(problem)}).") from None
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ToolkitError(f"adapter {shown(str(folder))} must have peft_type LORA, got {kind}.")
    for field, allowed in _NEEDED.items():
        got = getattr(config, field, allowed)
        if got != allowed and got:
            raise ToolkitError(f"adapter {shown(str(folder))} must have {field} {allowed}, got {shown(str(got))}.")
    config.inference_mode = True
    return config, tensors


def _without_base(model: nn.Module, tensors: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """The adapter's own tensors. PEFT saves embeddings and heads that it adapts beside it: they must be the model's."""
    own = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name in [name for name in tensors if "lora_" not in name]:
        path = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        mine, theirs = own.get(path), tensors[name]
        if mine is not None and list(theirs.shape) == whole_shapes(model).get(path):
            theirs = _share_of_rank(model, theirs, mine)
        if mine is None or mine.shape != theirs.shape or not torch.equal(mine.cpu().to(theirs.dtype), theirs):
            raise ToolkitError(
                f"adapter {shown(str(folder))} must have the model's own weights beside it, got other {name}."
            )
    return {name: tensor for name, tensor in tensors.items() if "lora_" in name}


def _share_of_rank(model: nn.Module, whole: Tensor, mine: Tensor) -> Tensor:
    """This rank's rows of a weight that is split as ``mine`` is; all of one that is not."""
    group = group_of_model(model)
    if group is None or mine.shape == whole.shape:
        return whole
    rows = share(len(whole), dist.get_rank(group_of(group)), num_ranks(group))
    return whole[rows]


def take_out(model: nn.Module, name: str) -> Parts:
    """Take an adapter out of the model's wrappers, to be given to ``put_in``."""
    parts = parts_of(model, name)
    for module, attribute, _ in parts:
        del getattr(module, attribute)[name]
    return parts


def put_in(parts: Parts, name: str) -> None:
    """Put back what ``take_out`` took."""
    for module, attribute, part in parts:
        getattr(module, attribute)[name] = part


def remove_adapter(model: nn.Module, name: str, kept: Iterable[Parts] = ()) -> None:
    """Take an adapter out for good, and the wrappers that have none left.

    Args:
        model: with the adapter.
        name: of it.
        kept: what was taken out and will be put in again: its wrappers stay.
    """
    take_out(model, name)
    needed = {id(module) for parts in kept for module, _, _ in parts}
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            while child is not None and is_adapter(child) and not _has_adapters(child) and id(child) not in needed:
                child = parent._modules[child_name] = child.base_layer  # type: ignore[assignment]


def move(parts: Parts, device: torch.device | str) -> None:
    """Move what ``take_out`` took to a device."""
    for _, _, part in parts:
        for parameter in _parameters(part):
            parameter.data = parameter.data.to(device)


def contents(parts: Parts) -> bytes:
    """A digest of an adapter's tensors and numbers, wherever they are: equal where all of them are."""
    digest = blake2b(digest_size=32)
    for _, attribute, part in parts:
        digest.update(attribute.encode())
        if isinstance(part, (bool, int, float, str)):
            digest.update(repr(part).encode())
        for tensor in _parameters(part):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _switches(model: nn.Module) -> Iterator[Any]:
    return (module for module in adapter_layers(model) if hasattr(module, "_active_adapter"))


def parts_of(model: nn.Module, name: str) -> Parts:
    """What ``take_out`` takes, which stays in the model."""
    found: Parts = []
    for module in adapter_layers(model):
        # DoRA names its magnitudes a second time.
        for attribute in dict.fromkeys((*module.adapter_layer_names, *module.other_param_names, "lora_variant")):
            mapping = getattr(module, attribute, None)
            if mapping is not None and hasattr(mapping, "keys") and name in mapping:
                found.append((module, attribute, mapping[name]))
    return found


def _parameters(part: Any) -> list[nn.Parameter]:
    """Of what a wrapper's mapping has for an adapter: a module, a parameter, or a setting."""
    if isinstance(part, nn.Module):
        return list(part.parameters())
    return [part] if isinstance(part, nn.Parameter) else []


def _has_adapters(module: Any) -> bool:
    return any(len(getattr(module, attribute, ())) for attribute in module.adapter_layer_names)


def _cast(model: nn.Module, name: str) -> None:
    """Give an adapter's tensors a dtype that is no narrower than the layer's."""
    for module, _, part in parts_of(model, name):
        layer = next(iter(module.get_base_layer().parameters()))
        for tensor in _parameters(part):
            tensor.data = tensor.data.to(layer.device, torch.promote_types(tensor.dtype, layer.dtype))


@contextmanager
def _unchanged_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT may switch gradients of other parameters off or on; at the end they are as they were."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
