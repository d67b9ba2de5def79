"""Attention layers: through the attention interface, and with a fused forward where the layer has the usual structure.

A configuration selects the interface for all layers that have it, and for the masks that they are handed, so all of
them must be proven. A tower's layers have another configuration.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import first_line
from toolkit.modules.attention import FusedAttention
from toolkit.modules.latent_attention import parts_of
from toolkit.modules.prompt_window import prompt_window_forward
from toolkit.modules.row_positions import row_positions_forward
from toolkit.numerics import Numerics
from toolkit.patching import attention_interface
from toolkit.patching.attention_configs import FIELD, configs_of_layer, modules_beside, set_implementation
from toolkit.patching.attention_interface import IMPLEMENTATION, MASKED, NAME, weights_wanted
from toolkit.patching.attention_probe import FAR, LENGTH, PROBE_WINDOW, ROWS, Probe, Seen
from toolkit.patching.cache_windows import cache_window, keeps_prompt
from toolkit.patching.calls import MASK, Call, record_calls
from toolkit.patching.claim import Claim, ProbeError, Skipped, Undo, replace_forward, set_attribute, together
from toolkit.patching.instance_forward import UNPROVEN, foreign_forward
from toolkit.patching.mask_borders import BOTH_SIDES, CAUSAL, border_reason
from toolkit.patching.probe import device_of, signature_key
from toolkit.patching.roles.biased_attention import prove_biased, relative_logits_of
from toolkit.patching.roles.pooled_attention import pooling_indexer_of, prove_pooled
from toolkit.patching.roles.sparse_attention import indexer_of, is_sparse, prove_sparse
from toolkit.patching.search import prove
from toolkit.patching.settings import guarded, mask_settings, settings_of

PADDING_READ = "the model's head reads rows of padding, which the interface leaves zero"
_READ_AGAIN = ("scaling", "attention_dropout")


def _is_attention(module: nn.Module) -> bool:
    return (
        hasattr(module, "is_causal")
        and (hasattr(module, "layer_idx") or _sees_ahead(module))
        and any(getattr(getattr(child, "weight", None), "ndim", 0) == 2 for child in module.children())
    )


def _sees_ahead(module: nn.Module) -> bool:
    """Whether a layer says that its tokens see those after them: it keeps no state, and needs no index for it."""
    return getattr(module, "is_causal", True) is False


def _fused_options(module: nn.Module, probe: Probe) -> list[Any]:
    names = {name for name, _ in module.named_children()}
    out = next((name for name in ("o_proj", "out_proj", "dense") if name in names), None)
    if not {"q_proj", "k_proj", "v_proj"} <= names or out is None or probe.tables is None or probe.call.positional > 1:
        return []
    q_norm, k_norm = ("q_norm" if "q_norm" in names else None), ("k_norm" if "k_norm" in names else None)
    options = []
    for interleaved in (False, True):

        def parts(window: int, interleaved: bool = interleaved) -> FusedAttention:
            seen = probe.seen
            return FusedAttention(
                "q_proj",
                "k_proj",
                "v_proj",
                out,
                q_norm,
                k_norm,
                seen.sinks,
                interleaved,
                seen.head_dim,
                window,
                seen.softcap,
            )

        own = type(module).forward
        probed = parts(PROBE_WINDOW if probe.seen.window else 0).make_forward(own)
        op = f"attention (fused, {'interleaved' if interleaved else 'half'} rotary)"
        fused = parts(probe.seen.window).make_forward(own, weights_wanted)
        options.append((op, fused, partial(probe.forward_error, probed)))
    return options


def _latent_options(module: nn.Module, probe: Probe) -> list[Any]:
    """The latent forward handles ragged batches only."""
    options = []
    for interleaved in (False, True):
        parts = parts_of(module, interleaved)
        if parts is None or probe.tables is None or probe.seen.window or probe.seen.softcap or probe.seen.sinks:
            return []
        forward = parts.make_forward(type(module).forward)
        op = f"latent attention ({'interleaved' if interleaved else 'half'} rotary)"
        options.append((op, forward, partial(probe.ragged_error, forward)))
    return options


def _verdict(module: nn.Module, probe: Probe) -> tuple[str, Any, ProbeError] | str:
    """What takes the place of the layer's forward, or why nothing has to.

    Raises:
        RuntimeError: a ragged batch would have other positions in it.
    """
    if probe.reads_cache:
        forward = row_positions_forward(type(module).forward)
        op = "attention (positions of its rows)"
        found = prove([(op, forward, partial(probe.ragged_error, forward, (FAR, 3 * FAR)))])
        if isinstance(found, str):
            raise RuntimeError(f"it counts positions from its cache's length, and {found}")
        return found
    found = prove(_fused_options(module, probe))
    return found if isinstance(found, tuple) else prove(_latent_options(module, probe))


def _kept_by_cache(model: Any, index: int | None, seen: Seen | None) -> tuple[int, str | None]:
    """The window behind a prompt that a layer's cache keeps (0 for all), or why it keeps less than masks show."""
    if seen is None:
        return 0, None
    config = model.config.get_text_config()
    window = cache_window(config, index)
    if not window or 0 < seen.window <= window:
        return 0, None
    if not (seen.window or seen.softcap) and keeps_prompt(config, index):
        return window, None
    return 0, f"its masks show more than the {window} tokens that its cache keeps: generate() and the forward differ"


@dataclass(frozen=True)
class _Proven:
    """A layer that may run the registered function.

    Args:
        caller: the name in the layer of the module that calls the interface.
        error: of the layer's own forward through the interface.
        fused: the name, the forwards and the probe error of what takes the place of its forward (""), and of those of
            its parts, by their names; None where nothing has to.
        seen: what it hands the interface; None for sparse attention.
        shown: tokens that its masks must show a token, itself included; 0 for all before it.
        window: tokens behind the prompt that a token sees; 0 for all.
        masked: whether its masks are causal although it says otherwise.
    """

    caller: str
    error: ProbeError
    fused: tuple[str, dict[str, Any], ProbeError] | None
    seen: Seen | None = None
    shown: int = 0
    window: int = 0
    masked: bool = False

    @property
    def bidirectional(self) -> bool:
        """Whether tokens see those after them."""
        return self.seen is not None and not (self.seen.causal or self.masked)


def _prove(module: nn.Module, call: Call) -> _Proven | str:
    """What was proven of a layer, or why it keeps its own attention."""
    if not hasattr(_config(module), FIELD):
        return "it has no configuration that names an attention implementation"
    biased = relative_logits_of(module)
    if biased is not None:
        try:
            found = prove_biased(module, call, biased)
        except Exception as problem:
            return f"its probe with biases by distance failed: {first_line(problem, with_class=True)}"
        window = int(getattr(module, "sliding_window", None) or 0)
        return found if isinstance(found, str) else _Proven("", found[2], found, shown=window)
    pooled = pooling_indexer_of(module) is not None
    if pooled or is_sparse(module):
        try:
            sparse = prove_pooled(module, call) if pooled else prove_sparse(module, call)
            if isinstance(sparse, str) and not pooled and indexer_of(module) is None:
                sparse = prove_pooled(module, call)  # the selection that it is handed may be one of pools
        except Exception as problem:
            return f"its probe as sparse attention failed: {first_line(problem, with_class=True)}"
        return sparse if isinstance(sparse, str) else _Proven("", sparse[2], sparse)
    masked = not getattr(module, "is_causal", True) and _is_causal_mask(call.arguments.get(MASK))
    if masked and getattr(_config(module), FIELD) not in ("eager", "sdpa", NAME):
        return f"it is not causal without a mask, as {getattr(_config(module), FIELD)} may run it"
    try:
        probe = Probe(module, call, masked=masked)
        error = probe.error(thorough=False)
    except Exception as problem:
        why = first_line(problem, with_class=True)
        return f"its probe through the attention interface, which has no mask, failed: {why}"
    if not error.passes():
        return f"the interface changes it: probe error {error.worst():.1e}"
    try:
        if masked and probe.reads_cache:
            return "it counts positions from its cache's length, and is not causal without a mask"
        fused = "its own forward knows what it sees without a mask" if masked else _verdict(module, probe)
        if isinstance(fused, str):
            error = probe.error()
    except Exception as problem:
        return first_line(problem)
    if not error.passes():
        return f"the interface changes it: probe error {error.worst():.1e}{error.where}"
    if isinstance(fused, str):
        return _Proven(probe.seen.caller, error, None, probe.seen, probe.seen.window, masked=masked)
    op, forward, fused_error = fused
    return _Proven(probe.seen.caller, error, (op, {"": forward}, fused_error), probe.seen, probe.seen.window)


def _is_causal_mask(mask: Any) -> bool:
    """Whether an eager mask [B, 1, S, S] shows no key ahead of its query."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        return False
    visible = mask if mask.dtype == torch.bool else mask >= 0
    return not bool(visible.triu(1).any())


def _index(path: str, module: Any, calls: dict[nn.Module, list[Call]]) -> int | None:
    """The index of a layer: its attribute, or its place in the model where the model calls layers with theirs."""
    index = _layer_idx(module)
    handed = bool(calls[module]) and isinstance(calls[module][0].arguments.get("layer_idx"), int)
    if index is None and (handed or _sees_ahead(module)):
        index = next((int(part) for part in path.split(".") if part.isdigit()), None)
    return index if isinstance(index, int) else None


def _content(mask: Any) -> Any:
    """What two masks have in common that show the same tokens."""
    if not isinstance(mask, Tensor):
        return None
    return tuple(mask.shape), (mask >= 0 if mask.is_floating_point() else mask).cpu().numpy().tobytes()


def _layer_idx(module: nn.Module) -> Any:
    return getattr(module, "layer_idx", None)


def _with_index(module: Any, index: int | None, proven: _Proven | str) -> _Proven | str:
    """``proven``, or why the index that the interface reads is not the layer's."""
    if isinstance(proven, str):
        return proven
    other = _layer_idx(module.get_submodule(proven.caller))
    if isinstance(other, int) and other != index:
        return f"its {proven.caller}, which calls the attention interface, has layer_idx {other} in a layer of {index}"
    return proven


def _as_kept(model: Any, index: int | None, proven: _Proven | str) -> _Proven | str:
    """``proven`` with what the layer's cache keeps, or why that is less than its masks show."""
    if isinstance(proven, str) or proven.bidirectional:
        return proven
    window, reason = _kept_by_cache(model, index, proven.seen)
    return replace(proven, window=window) if reason is None else reason


def _verdicts(model: Any, layers: dict[str, Any], calls: dict[nn.Module, list[Call]]) -> dict[str, _Proven | str]:
    indices = Counter(_index(path, module, calls) for path, module in layers.items())
    found: dict[str, _Proven | str] = {}
    proven: dict[Any, _Proven | str] = {}
    borders: dict[Any, str | None] = {}
    for path, module in layers.items():
        other = foreign_forward(module)
        if other is not None:
            found[path] = UNPROVEN.format(other)
        elif len(calls[module]) > 1 and not _sees_ahead(module):
            found[path] = "the model calls it more than once in a forward"
        elif _index(path, module, calls) is None or indices[_index(path, module, calls)] > 1:
            found[path] = "its layer_idx is missing or shared"
        else:
            call = calls[module][0]
            given = sorted(name for name, value in call.arguments.items() if value is not None)
            key = signature_key(module), id(module.config), tuple(given), _content(call.arguments.get(MASK))
            if key not in proven:
                proven[key] = _prove(module, call)
            index = _index(path, module, calls)
            known = _as_kept(model, index, _with_index(module, index, proven[key]))
            if not isinstance(known, str):  # probes ran with shorter windows, of layer and masks
                kind = BOTH_SIDES if known.bidirectional else CAUSAL
                asked = id(call.shows), known.shown, id(module.config), kind
                if asked not in borders:
                    borders[asked] = border_reason(call.shows, known.shown, module.config, device_of(module), kind)
                known = borders[asked] or known
            found[path] = known
    return found


def _claim(path: str, module: Any, index: int | None, proven: _Proven, configs: list[Any], keeping: list[Any]) -> Claim:
    """Sets the layer's ``configs``, names the implementation of its caller, and puts in its forward.

    Args:
        keeping: other modules of the configurations, which keep their implementation.
    """
    caller = module.get_submodule(proven.caller)
    installs: list[Callable[[], Undo]] = [partial(set_attribute, caller, IMPLEMENTATION, NAME)]
    if proven.masked:
        installs.append(partial(set_attribute, caller, MASKED, getattr(module.config, FIELD)))
    installs += [partial(set_attribute, one, IMPLEMENTATION, getattr(one.config, FIELD)) for one in keeping]
    installs += [partial(set_implementation, config, FIELD, NAME) for config in configs]
    unnumbered = [one for one in dict.fromkeys((module, caller)) if not isinstance(_layer_idx(one), int)]
    installs += [partial(set_attribute, one, "layer_idx", index) for one in unnumbered]
    # The own forward reads its settings again, and those that its masks are made by are the configuration's.
    op, forwards, error = proven.fused or ("attention interface", {}, proven.error)
    own = settings_of(module, _READ_AGAIN) if proven.fused else ()
    settings = dict(own) | dict(mask_settings(module)) | {"config._attn_implementation": NAME}
    forwards = {"": type(module).forward} | forwards
    if proven.window:
        forwards[""] = prompt_window_forward(forwards[""], proven.window)
        op = f"{op}, the prompt and a window of {proven.window}"
    forwards[""] = guarded(forwards[""], tuple(settings.items()))
    installs += [replace_forward(module.get_submodule(name), forward) for name, forward in forwards.items()]
    kept = proven.window > 0
    return Claim("attention", path, module, op, error, together(*installs), None, kept, proven.bidirectional)


def _reads_padding(model: nn.Module) -> bool:
    """Whether the model's loss is a softmax over the places of a row, those of padding among them (answers' spans)."""
    return "start_positions" in inspect.signature(type(model).forward).parameters


def _config(module: Any) -> Any:
    return module.__dict__.get("config")


def find(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on each layer whose configuration's layers are all proven.

    A layer runs the registered function where its configuration says so, and gets a fused forward where it has the
    usual structure. Layers that a forward of text does not call keep their own attention: a tower's, cross-attention.
    """
    attention_interface.register()
    layers = {path: module for path, module in model.named_modules() if _is_attention(module)}
    if not layers:
        return []
    if _reads_padding(model):
        return [Skipped("attention", path, PADDING_READ) for path in layers]
    try:
        calls = record_calls(model, list(layers.values()), ROWS, LENGTH, PROBE_WINDOW)
    except Exception as problem:
        reason = f"the model's forward failed: {first_line(problem, with_class=True)}"
        return [Skipped("attention", path, reason) for path in layers]
    layers = {path: module for path, module in layers.items() if calls[module]}
    verdicts = _verdicts(model, layers, calls)
    refused = {path: verdict for path, verdict in verdicts.items() if isinstance(verdict, str)}
    found: list[Claim | Skipped] = [Skipped("attention", path, reason) for path, reason in refused.items()]
    keepers = {id(_config(layers[path])): path for path in reversed(refused)}
    callers = {layers[path].get_submodule(one.caller) for path, one in verdicts.items() if isinstance(one, _Proven)}
    others = modules_beside(model, callers)
    for path, proven in verdicts.items():
        if isinstance(proven, str):
            continue
        keeper = keepers.get(id(layers[path].config))
        if keeper is not None:
            reason = f"{keeper}, which has the same configuration, keeps its own attention: {refused[keeper]}"
            found.append(Skipped("attention", path, reason))
            continue
        configs = [config for config in configs_of_layer(model, path) if id(config) not in keepers]
        keeping = [one for config in configs for one in others.pop(id(config), [])]
        index = _index(path, layers[path], calls)
        found.append(_claim(path, layers[path], index, proven, configs, keeping))
    return found
