"""How processes share the model, by the names of transformers, accelerate and Axolotl."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.config.translation.base import Translation

OF_ACCELERATE = {
    "multi_gpu": "ddp",
    "fsdp1": "fsdp2",
    "fsdp2": "fsdp2",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
}
"""Values of TRL's ``accelerate_config``."""


def processes(t: Translation) -> None:
    """``deepspeed``, ``fsdp*``, ``tensor_parallel_size`` and ``accelerate_config`` as ``train.distributed``."""
    if t.get("deepspeed") is not None:
        _deepspeed(t)
    elif t.get("fsdp") or t.get("fsdp_config") or t.get("fsdp_version"):
        _fsdp(t)
    elif t.take("tensor_parallel_size", 1) != 1:
        t.put_where_valid("train.distributed", {"strategy": "tp"}, "tensor_parallel_size")
    given = t.take("accelerate_config")
    if given is not None and given != "single_gpu":
        name = Path(str(given)).stem
        if name in OF_ACCELERATE:
            t.put_where_valid("train.distributed", {"strategy": OF_ACCELERATE[name]}, "accelerate_config")
        else:
            t.lose("accelerate_config", "train.distributed says how processes share the model")
    if t.get("num_processes") is not None:
        t.unneeded("num_processes", f"toolkit train --num-processes {t.get('num_processes')} starts them")


def _deepspeed(t: Translation) -> None:
    given = t.take("deepspeed")
    settings: Any = given
    value: dict[str, Any] = {}
    if isinstance(given, str):
        value = {"deepspeed": given}
        try:
            settings = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            named = re.search(r"zero[_-]?([123])", given, re.IGNORECASE)
            if named is None:
                t.lose("deepspeed", "the file is not there, and train.distributed needs its ZeRO stage")
                return
            value, settings = {}, {"zero_optimization": {"stage": int(named[1])}}
            t.lose("deepspeed", f"the file is not there: zero{named[1]} by its name, with DeepSpeed's defaults")
    zero = settings.get("zero_optimization") if isinstance(settings, Mapping) else None
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if stage not in (1, 2, 3):
        t.lose("deepspeed", f"train.distributed has the stages 1, 2 and 3, not {stage}")
        return
    offloads = [_of_cpu(zero.get(name)) for name in ("offload_optimizer", "offload_param")] if zero else []
    if isinstance(given, Mapping) and any(offloads):
        value = {"cpu_offload": True}
    t.put_where_valid("train.distributed", {"strategy": f"zero{stage}", **value}, "deepspeed")


def _of_cpu(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("device") == "cpu"


def _fsdp(t: Translation) -> None:
    words = t.take("fsdp", [])
    options = set(words.split() if isinstance(words, str) else words if isinstance(words, list) else ())
    config = t.take("fsdp_config", {})
    config = (
        {str(key).removeprefix("fsdp_"): value for key, value in config.items()} if isinstance(config, Mapping) else {}
    )
    version = t.take("fsdp_version", config.get("version"))
    for name in ("fsdp", "fsdp_config"):
        t.unneeded(name, "fsdp2 shards by decoder layer, and saves whole weights")
    if version in (None, 1, "1"):
        t.unneeded("fsdp_version", "fsdp2 is torch's successor of version 1")
    if config.get("activation_checkpointing"):
        t.put("train.gradient_checkpointing", True, "fsdp_config")
    offload = bool("offload" in options or config.get("offload_params") or config.get("cpu_offload"))
    name = next(name for name in ("fsdp", "fsdp_config", "fsdp_version") if t.get(name))
    t.put_where_valid("train.distributed", {"strategy": "fsdp2", **({"cpu_offload": True} if offload else {})}, name)
