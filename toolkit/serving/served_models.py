"""The names that requests may give as ``model``: of the served model, and of adapters on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.sentences import shown
from toolkit.serving.errors import RequestError


@dataclass(frozen=True)
class ServedModel:
    """What a request's ``model`` names.

    Args:
        name: that the response gives.
        lora_name: of the adapter; None for the model itself.
    """

    name: str
    lora_name: str | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of ``SamplingParams`` that choose it."""
        return {} if self.lora_name is None else {"lora_name": self.lora_name}


class ServedModels:
    """The served model and its adapters, which come and go.

    Args:
        names: of the model; responses give the first.
        adapters: the folder of each.
    """

    def __init__(self, names: tuple[str, ...], adapters: Mapping[str, str]) -> None:
        self.names = names
        self.adapters = dict(adapters)

    @property
    def all(self) -> list[str]:
        """Every name, those of adapters last."""
        return [*self.names, *list(self.adapters)]

    def find(self, asked: str | None) -> ServedModel:
        """What is asked for; None is the model. Raises RequestError for a name that nothing has."""
        if asked is None or asked in self.names:
            return ServedModel(self.names[0])
        if asked in self.adapters:
            return ServedModel(asked, asked)
        which = " or ".join(map(shown, self.all))
        raise RequestError(f"'model' must be {which}, got {shown(asked)}.", "model", status=404, code="model_not_found")

    def relation(self, name: str) -> dict[str, str | None]:
        """``parent`` and ``root`` of a model's card, as vLLM gives them."""
        is_adapter = name in self.adapters and name not in self.names
        return {
            "parent": self.names[0] if is_adapter else None,
            "root": self.adapters[name] if is_adapter else self.names[0],
        }
