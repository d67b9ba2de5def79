"""Non-causal attention layers of towers: images and audio, whose tokens all see each other, through the interface.

A configuration selects the interface for all layers that have it, so all of them must be proven; other modules of the
configuration keep what they ran. Layers that a forward of text calls have role ``attention``.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from toolkit.errors import first_line
from toolkit.numerics import Numerics
from toolkit.patching import attention_interface
from toolkit.patching.attention_configs import FIELD, modules_beside, set_implementation
from toolkit.patching.attention_interface import IMPLEMENTATION, NAME
from toolkit.patching.attention_probe import LENGTH, PROBE_WINDOW, ROWS
from toolkit.patching.calls import record_calls
from toolkit.patching.claim import Claim, ProbeError, Skipped, Undo, replace_forward, set_attribute, together
from toolkit.patching.encoder_probe import EncoderProbe, UnfitError
from toolkit.patching.instance_forward import UNPROVEN, foreign_forward
from toolkit.patching.probe import signature_key
from toolkit.patching.settings import guarded

ROLE = "encoder_attention"
OP = "attention interface (every token sees all)"


def _config(module: nn.Module) -> Any:
    return module.__dict__.get("config")


def _is_encoder_attention(module: Any) -> bool:
    """By its structure: projections, and a forward that asks for an attention implementation or says it sees ahead."""
    if isinstance(module, PreTrainedModel) or getattr(module, "is_causal", False):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    dispatches = code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    known = dispatches or getattr(module, "is_causal", None) is False
    return known and any(parameter.dim() == 2 for parameter in module.parameters())


def _text_config(model: Any) -> Any:
    """The configuration of the layers that a text reaches; None for a model that takes no text."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config()
    return None if text is config and getattr(model, "main_input_name", "input_ids") != "input_ids" else text


def _reached(model: Any, layers: dict[str, Any]) -> set[nn.Module]:
    """Those that a forward of text calls."""
    numbered = [module for module in layers.values() if hasattr(module, "layer_idx")]
    if not numbered:
        return set()
    try:
        return {module for module, calls in record_calls(model, numbered, ROWS, LENGTH, PROBE_WINDOW).items() if calls}
    except Exception:  # role attention has none of them either
        return set()


def _prove(module: nn.Module) -> ProbeError | str:
    """The error of the layer's own forward through the interface, or why it keeps its own attention."""
    if not hasattr(_config(module), FIELD):
        return "it has no configuration that names an attention implementation"
    try:
        error = EncoderProbe(module).error()
    except UnfitError as problem:
        return first_line(problem)
    except Exception as problem:
        return f"its probe through the attention interface failed: {first_line(problem, with_class=True)}"
    return error if error.passes() else f"the interface changes it: probe error {error.worst():.1e}{error.where}"


def _verdicts(layers: dict[str, Any]) -> dict[str, ProbeError | str]:
    found: dict[str, ProbeError | str] = {}
    proven: dict[Any, ProbeError | str] = {}
    for path, module in layers.items():
        other = foreign_forward(module)
        if other is not None:
            found[path] = UNPROVEN.format(other)
            continue
        key = signature_key(module), id(_config(module))
        if key not in proven:
            proven[key] = _prove(module)
        found[path] = proven[key]
    return found


def _claim(path: str, module: Any, error: ProbeError, keeping: list[Any]) -> Claim:
    """Sets the layer's configuration, names its implementation, and holds it to that configuration.

    Args:
        keeping: other modules of the configuration, which keep their implementation.
    """
    installs: list[Callable[[], Undo]] = [partial(set_attribute, module, IMPLEMENTATION, NAME)]
    installs += [partial(set_attribute, one, IMPLEMENTATION, getattr(one.config, FIELD)) for one in keeping]
    installs.append(partial(set_implementation, module.config, FIELD, NAME))
    forward = guarded(type(module).forward, (("config._attn_implementation", NAME),))
    return Claim(ROLE, path, module, OP, error, together(*installs, replace_forward(module, forward)))


def find(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on each layer whose configuration's layers are all proven."""
    attention_interface.register()
    text = _text_config(model)
    layers = {path: module for path, module in model.named_modules() if _is_encoder_attention(module)}
    layers = {path: module for path, module in layers.items() if text is None or _config(module) is not text}
    reached = _reached(model, layers)
    layers = {path: module for path, module in layers.items() if module not in reached}
    verdicts = _verdicts(layers)
    refused = {path: verdict for path, verdict in verdicts.items() if isinstance(verdict, str)}
    found: list[Claim | Skipped] = [Skipped(ROLE, path, reason) for path, reason in refused.items()]
    keepers = {id(_config(layers[path])): f"{path}, {refused[path]}" for path in reversed(refused)}
    keepers |= {id(_config(module)): "layers that a text reaches" for module in reached}
    others = modules_beside(model, {layers[path] for path in verdicts if path not in refused})
    for path, error in verdicts.items():
        if isinstance(error, str):
            continue
        config = id(layers[path].config)
        if config in keepers:
            reason = f"others of its configuration keep their own attention: {keepers[config]}"
            found.append(Skipped(ROLE, path, reason))
        else:
            found.append(_claim(path, layers[path], error, others.pop(config, [])))
    return found
