"""Which of transformers' auto classes opens a checkpoint as the class that wrote it."""

from typing import Any


def auto_class(config: Any) -> Any:
    """``AutoModelForMultimodalLM`` or ``AutoModelForCausalLM``, whichever keeps all that the checkpoint has.

    The class that the configuration names under ``architectures`` decides. Where it names none, a configuration with
    sub-configurations (text and towers) opens with its towers.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    code = getattr(config, "auto_map", None) or {}
    for name in ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText"):
        if name in code:
            return getattr(transformers, name)
    causal = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config)
    with_towers = _names(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, config)
    named = set(getattr(config, "architectures", None) or ())
    if named & causal or not with_towers:
        return transformers.AutoModelForCausalLM
    composed = config.get_text_config() is not config
    if named & with_towers or not causal or composed:
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def _names(mapping: Any, config: Any) -> set[str]:
    """The classes that a mapping has for the configuration's model type."""
    found = mapping.get(config.model_type, ())
    return {found} if isinstance(found, str) else set(found)
