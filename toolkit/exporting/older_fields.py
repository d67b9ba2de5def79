"""Fields of a configuration under the names that they had before transformers 5.

Readers of those names (transformers 4, vLLM, mlx-lm, mistral.rs) refuse a folder without them, or take their own
defaults without a word. transformers 5 reads both.
"""

import json
from pathlib import Path
from typing import Any

from toolkit.loading.source import read_json

Fields = dict[str, Any]
WINDOW, ALL = "sliding_attention", "full_attention"
RENAMED = {
    "lfm2": {"block_dim": "hidden_size", "conv_dim": "hidden_size"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
    "qwen3_vl_moe_text": {"num_experts": "num_local_experts"},
}
"""Of a model type: the older name of a field."""


def write_older_fields(path: Path) -> None:
    """Add what ``older_fields`` finds to the configuration at ``path`` and to its sections; nothing is overwritten."""
    config = read_json(path)
    for section in (config, *(one for one in config.values() if isinstance(one, dict))):
        for name, value in older_fields(section).items():
            section.setdefault(name, value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_fields(section: Fields) -> Fields:
    """The fields of ``section`` under older names."""
    found = gemma3_fields(section) if section.get("model_type") == "gemma3_text" else {}
    found |= rotary_fields(section.get("rope_parameters"))
    if section.get("model_type") == "qwen3_moe" and not section.get("use_sliding_window"):
        found["max_window_layers"] = section["num_hidden_layers"]
    for name, newer in RENAMED.get(section.get("model_type", ""), {}).items():
        if newer in section:
            found[name] = section[newer]
    return found


def rotary_fields(rotary: Any) -> Fields:
    """``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` for ``rope_parameters`` that all layers share."""
    if not isinstance(rotary, dict) or not isinstance(rotary.get("rope_theta"), int | float):
        return {}
    found = {name: rotary[name] for name in ("rope_theta", "partial_rotary_factor") if name in rotary}
    if rotary.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in rotary.items() if key != "rope_theta"}
    return found


def gemma3_fields(section: Fields) -> Fields:
    """Those of the rotation in layers with and without a window, and of which layers have one if that is periodic."""
    rotary, kinds = section.get("rope_parameters") or {}, section.get("layer_types") or []
    found = rotary_fields(rotary.get(ALL))
    local = rotary.get(WINDOW, {}).get("rope_theta")
    if local is not None:
        found["rope_local_base_freq"] = local
    if ALL in kinds:
        period = kinds.index(ALL) + 1
        if kinds == [WINDOW if (at + 1) % period else ALL for at in range(len(kinds))]:
            found["sliding_window_pattern"] = period
    return found
