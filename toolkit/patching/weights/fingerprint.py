"""A hash of what a model computes with, the same in every process that has the same weights and settings."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from toolkit.patching.record import report_of
from toolkit.patching.weights.tensors import tensor_attributes, tensor_entries

_CHUNK = 1 << 28  # bytes of a tensor that are copied to the CPU at once
_SIMPLE = (bool, int, float, str, type(None))
_PATHS = {"name_or_path", "_name_or_path"}
"""Settings that say where a model lies, and not what it computes."""


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal digits, of every parameter and buffer, the modules' settings, the configuration and the
    patch.

    All bytes of all weights are read: seconds for each gigabyte or two.
    """
    found = hashlib.sha256()
    report = report_of(model)
    if report is not None:
        claims = sorted((claim.role, claim.op, claim.path) for claim in report.claims)
        found.update(f"{report.numerics} {claims}".encode())
    config: Any = getattr(model, "config", None)
    if config is not None:
        found.update(json.dumps(_without_paths(config.to_dict()), sort_keys=True, default=repr).encode())
    for path, module in model.named_modules():
        settings = {
            name: value
            for name, value in module.__dict__.items()
            if not name.startswith("_") and name not in _PATHS | {"training"} and _is_setting(value)
        }
        found.update(f"{path} {type(module).__qualname__} {sorted(settings.items())}".encode())
        for _, name, value in [*tensor_entries(module), *tensor_attributes(module)]:
            if isinstance(value, Tensor):
                found.update(name.encode())
                _add(found, value)
    return found.hexdigest()


def _add(found: "hashlib._Hash", tensor: Tensor) -> None:
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            found.update(name.encode())
            _add(found, getattr(tensor, name))
        return
    rows = tensor.detach().reshape(-1)
    step = max(1, _CHUNK // tensor.element_size())
    for start in range(0, rows.numel(), step):
        found.update(rows[start : start + step].cpu().contiguous().view(torch.uint8).numpy().data)


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    if isinstance(value, dict):
        return all(isinstance(key, _SIMPLE) and _is_setting(one) for key, one in value.items())
    return isinstance(value, _SIMPLE)


def _without_paths(fields: Any) -> Any:
    if isinstance(fields, dict):
        return {str(name): _without_paths(value) for name, value in fields.items() if name not in _PATHS}
    return fields
