"""vLLM's way of naming the adapter of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.sentences import shown


@dataclass(frozen=True)
class LoRARequest:
    """An adapter of prompts.

    Args:
        lora_name: of the adapter.
        lora_int_id: accepted and unused: names tell adapters apart.
        lora_path: PEFT folder that it is loaded from where the engine does not have it yet.
        load_inplace: load it from ``lora_path`` once more, in the place of the one that the engine has.
    """

    lora_name: str
    lora_int_id: int | None = None
    lora_path: str | None = None
    load_inplace: bool = False


Adapters: TypeAlias = LoRARequest | Sequence[LoRARequest | None] | None


def with_adapters(engine: Engine, params: list[SamplingParams], given: Adapters) -> list[SamplingParams]:
    """``params`` that choose the adapters of ``given``, one for all prompts or one for each, which are loaded.

    Raises:
        ToolkitError: for another number of adapters than prompts, and an adapter that cannot be loaded.
    """
    if given is None:
        return params
    requests = given if isinstance(given, list | tuple) else [given] * len(params)
    for one in requests:
        if one is not None and not (isinstance(one, LoRARequest) and isinstance(one.lora_name, str)):
            raise ToolkitError(f"lora_request must be a LoRARequest, a list of them or None, got {shown(one)}.")
    if len(requests) != len(params):
        raise ToolkitError(f"lora_request must have one entry per prompt ({len(params)}), got {len(requests)}.")
    for request in dict.fromkeys(requests):
        if request is None:
            continue
        known = engine.adapters is not None and request.lora_name in engine.adapters.names
        if request.load_inplace or not known:
            if request.lora_path is None:
                raise ToolkitError(
                    f"lora_path of the adapter {request.lora_name!r} must be a folder, since it is not loaded yet."
                )
            engine.load_adapter(request.lora_name, request.lora_path, load_inplace=known)
    return [one if name is None else replace(one, lora_name=name.lora_name) for one, name in zip(params, requests)]
