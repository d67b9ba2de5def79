"""By which numerics a process computes: what must be equal on both sides for logprobs to be bitwise identical."""

from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import toolkit
from toolkit.engine.backend import Backend
from toolkit.ops import native
from toolkit.patching import report_of


def numerics_fingerprint(backend: Backend) -> dict[str, str]:
    """What the bits of a backend's logprobs depend on besides weights and tokens, by name.

    Returns:
        numerics: the mode, "bitwise" or "fast".
        dtype: of the weights.
        device: "cpu" or "cuda".
        instructions: the instruction set that torch uses on a CPU, or the name and compute capability of a GPU.
        native: the native CPU library, "none" without one; of a CPU only.
        family: the instructions of its GEMMs, see ``toolkit.ops.native.family``; of a CPU only.
        toolkit, torch, transformers, triton: versions, triton's of a GPU only.
    """
    on_cpu = backend.device.type == "cpu"
    found = {
        "numerics": str(getattr(backend, "numerics", "unknown")),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "device": backend.device.type,
    }
    if on_cpu:
        found["instructions"] = torch.backends.cpu.get_cpu_capability().lower()
        found["native"] = native.load() or "none"
        found["family"] = native.family(backend.dtype)
    else:
        major, minor = torch.cuda.get_device_capability(backend.device)
        found["instructions"] = f"{torch.cuda.get_device_name(backend.device)} sm_{major}{minor}"
    found |= {"toolkit": toolkit.__version__, "torch": torch.__version__}
    for package in ("transformers",) if on_cpu else ("transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def model_fingerprint(model: nn.Module) -> dict[str, str] | None:
    """``numerics_fingerprint`` of a patched model in this process; None for one that is not patched."""
    report, parameter = report_of(model), next(model.parameters())
    if report is None:
        return None
    seen: Any = SimpleNamespace(device=parameter.device, dtype=parameter.dtype, numerics=report.numerics)
    return numerics_fingerprint(seen)


def fingerprint_text(fingerprint: dict[str, str]) -> str:
    """A fingerprint in one line, as the header ``x-numerics-fingerprint`` has it."""
    return "; ".join(f"{name}={value}" for name, value in fingerprint.items())


def read_fingerprint(text: str) -> dict[str, str]:
    """A fingerprint of one line. Raises ValueError for text that is none."""
    found = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(part)
        found[name.strip()] = value.strip()
    return found


def differing_part(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """The first name whose value differs, or that only one of them has; None where they are equal."""
    return next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
