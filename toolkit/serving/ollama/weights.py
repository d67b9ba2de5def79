"""What Ollama's routes say about the weights of the served model."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WeightsInMemory:
    """The weights of a model as they are loaded.

    Args:
        family: the type of its architecture, as transformers names it; "" where it is not known.
        parameters: how many numbers they are.
        size: their bytes.
        on_device: those of them that are not in the host's memory.
        described: its configuration, and the names, shapes and types of the weights, as bytes.
    """

    family: str = ""
    parameters: int = 0
    size: int = 0
    on_device: int = 0
    described: bytes = b""

    @classmethod
    def of(cls, engine: Any) -> "WeightsInMemory":
        """Those of a served engine; of one without a model nothing is known."""
        inner = getattr(engine, "engine", None)
        model = getattr(getattr(inner, "backend", inner), "model", None)
        if model is None:
            return cls()
        held = list(model.named_parameters())
        sizes = [(one.device.type, one.numel() * one.element_size()) for _, one in held]
        config: Any = getattr(model, "config", None)
        shapes = [[name, str(one.dtype), list(one.shape)] for name, one in held]
        settings = config.to_json_string() if hasattr(config, "to_json_string") else ""
        return cls(
            str(getattr(config, "model_type", "")),
            sum(one.numel() for _, one in held),
            sum(size for _, size in sizes),
            sum(size for kind, size in sizes if kind != "cpu"),
            (settings + json.dumps(shapes)).encode(),
        )

    @property
    def parameter_size(self) -> str:
        """The number of parameters as Ollama writes it, such as "134.5M"; "" for none."""
        for unit, count in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
            if self.parameters >= count:
                return f"{self.parameters / count:.1f}{unit}"
        return str(self.parameters or "")

    def digest(self, version: int, adapter: str) -> str:
        """The SHA-256 of the model at a version of its weights, with an adapter's folder where one is named."""
        whole = self.described + f"\n{version}\n{adapter}".encode()
        return hashlib.sha256(whole).hexdigest() if self.described else ""
