"""Which of transformers' auto classes opens a checkpoint, as the class that wrote it or for what is asked of it."""

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


RUNNERS = ("generate", "pooling")


def runner_of(config: Any, pooled: bool) -> str:
    """What a checkpoint is for: "generate", or "pooling" (embeddings, scores, classes).

    Args:
        config: of the checkpoint, whose ``architectures`` decide.
        pooled: whether the files say how it is pooled, which decides before them.
    """
    from transformers.models.auto import modeling_auto

    if pooled:
        return "pooling"
    causal = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config)
    causal |= _names(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, config)
    named = set(getattr(config, "architectures", None) or ())
    foreign = any(not one.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for one in named)
    return "pooling" if named and foreign and not named & causal else "generate"


def pooling_class(config: Any) -> Any:
    """``AutoModelForSequenceClassification`` or ``...TokenClassification`` where the checkpoint has such a head, else
    ``AutoModel``."""
    import transformers

    named = getattr(config, "architectures", None) or ()
    for kind in ("SequenceClassification", "TokenClassification"):
        if any(one.endswith(f"For{kind}") for one in named):
            return getattr(transformers, f"AutoModelFor{kind}")
    return transformers.AutoModel


def _names(mapping: Any, config: Any) -> set[str]:
    """The classes that a mapping has for the configuration's model type."""
    found = mapping.get(config.model_type, ())
    return {found} if isinstance(found, str) else set(found)
