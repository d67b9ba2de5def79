"""The multi-token prediction layer of a checkpoint, which transformers' class leaves out, as a model of one layer.

With h_i what the model's head reads of token i, and e_j the embedding of token j, it computes
``h'_i = D(W [norm_e(e_{i+1}); norm_h(h_i)])``, where D is a decoder layer and a final norm. The model's own head makes
logits of token i+2 of h'_i, which may stand in the place of h_{i+1}.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.2; e stands before h, as the released weights have
it. Two layouts are read: a layer behind the last one with ``enorm, hnorm, eh_proj, shared_head.norm`` (DeepSeek-V3,
GLM-4.5 and later), and ``mtp.fc, mtp.pre_fc_norm_embedding, mtp.pre_fc_norm_hidden, mtp.norm, mtp.layers.0``
(Qwen3-Next).
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from toolkit.errors import ToolkitError, first_line
from toolkit.state.active import get_forward_context

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYER = re.compile(r"^(?P<path>.*\blayers\.(?P<index>\d+)\.)eh_proj\.weight$")
_TOP = re.compile(r"^(?P<path>(?:.*\.)?mtp\.)fc\.weight$")
_SHARED = ("embed_tokens.", "shared_head.head.")  # copies of the model's own


class MtpEmbedding(nn.Module):
    """What the layer is given of each token, in the place of an embedding: ``W [norm_e(e); norm_h(h)]``.

    h is ``RaggedBatch.previous_hidden``; a forward without it, of a probe, takes the embedding there too.
    """

    def __init__(self, embed: nn.Module, enorm: nn.Module, hnorm: nn.Module, eh_proj: nn.Module) -> None:
        super().__init__()
        self.embed, self.enorm, self.hnorm, self.eh_proj = embed, enorm, hnorm, eh_proj
        self.num_embeddings: int = embed.num_embeddings  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.embed.weight  # type: ignore[assignment]
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        context = get_forward_context()
        embeddings: Tensor = self.embed(ids)
        previous = None if context is None else context.batch.previous_hidden
        hidden = embeddings if previous is None else previous.reshape(embeddings.shape)
        found: Tensor = self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(hidden)], -1))
        return found


class _Parts(NamedTuple):
    """Tensors of the layer: of its decoder layer by the names within it, and the four around it."""

    layer: dict[str, Tensor]
    around: dict[str, Tensor]


def mtp_model(model: Any) -> nn.Module:
    """A causal language model of the one layer, not patched yet, on the embedding and the head of ``model``.

    Args:
        model: a Hugging Face causal language model that was loaded from a folder of safetensors files. Of several such
            layers the first is taken.

    Raises:
        ToolkitError: the folder is gone, has no such layer, or one of another form.
    """
    folder = _folder(model)
    parts = _read(folder)
    config = _config(model.config.get_text_config(), parts.layer)
    of_text = type(model.config) is type(config)
    kind: Any = type(model) if of_text else transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    names = {f"{kind.base_model_prefix}.layers.0.{name}": tensor for name, tensor in parts.layer.items()}
    names[f"{kind.base_model_prefix}.norm.weight"] = parts.around["norm"]
    config.tie_word_embeddings = False  # each takes its weight from the model
    embedding, head = _vocabulary_weights(model)
    names |= {f"{kind.base_model_prefix}.embed_tokens.weight": embedding, "lm_head.weight": head}
    try:
        with _without_progress():
            small, report = kind.from_pretrained(
                None, config=config, state_dict=names, dtype=model.dtype, output_loading_info=True
            )
    except Exception as error:  # tensors of other shapes, say
        raise ToolkitError(
            f"the multi-token prediction layer in '{folder}' is none of {kind.__name__} ({first_line(error)})."
        ) from None
    mismatched = (str(one[0]) for one in report["mismatched_keys"])
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"], *mismatched])
    decoder = small.get_decoder()
    if wrong or not hasattr(decoder, "norm") or not isinstance(small.get_output_embeddings(), nn.Linear):
        raise ToolkitError(
            f"the multi-token prediction layer in '{folder}' must be a decoder layer of {kind.__name__}, got another "
            f"form{f' of {wrong[0]}' if wrong else ''}."
        )
    decoder.embed_tokens = MtpEmbedding(
        small.get_input_embeddings(),
        _norm(decoder.norm, parts.around["enorm"]),
        _norm(decoder.norm, parts.around["hnorm"]),
        _linear(parts.around["eh_proj"], model.dtype),
    )
    small.to(next(model.parameters()).device).eval().requires_grad_(False)
    share_vocabulary(small, model)
    found: nn.Module = small
    return found


def mtp_tensors(names: Iterable[str], num_hidden_layers: int) -> list[str]:
    """Those of a checkpoint's tensors that belong to multi-token prediction layers."""
    names = list(names)
    paths = [found["path"] for name in names if (found := _TOP.match(name))]
    behind = [found for name in names if (found := _LAYER.match(name))]
    paths += [found["path"] for found in behind if int(found["index"]) >= num_hidden_layers]
    return [name for name in names if name.startswith(tuple(paths))]


def share_vocabulary(small: Any, model: Any) -> None:
    """Let ``mtp_model`` read the embedding and the head that ``model`` has now."""
    own = small.get_decoder().embed_tokens.embed, small.get_output_embeddings()
    for mine, weight in zip(own, _vocabulary_weights(model), strict=True):
        if mine.weight is not weight:
            mine.weight = weight


def _vocabulary_weights(model: Any) -> list[nn.Parameter]:
    """Of the model's embedding and head."""
    found = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ToolkitError(
                f"the model's {type(module).__name__} must have a parameter 'weight' to share with its multi-token "
                "prediction layer."
            )
        found.append(weight)
    return found


@contextmanager
def _without_progress() -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _folder(model: Any) -> Path:
    name = str(getattr(model, "name_or_path", "") or getattr(model.config, "name_or_path", "") or "")
    folder = Path(name)
    if name and not folder.is_dir():
        with suppress(OSError, ValueError):  # a repository that is not in the cache
            folder = Path(str(cached_file(name, "config.json", local_files_only=True))).parent
    if not name or not folder.is_dir():
        raise ToolkitError(
            "method of speculative_config must be another than 'mtp' for a model that was loaded from no folder of "
            f"safetensors files, got {name or 'none'!r}."
        )
    return folder


def _read(folder: Path) -> _Parts:
    """The tensors of the layer in the checkpoint's files, found by its projection."""
    files = [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        shards = json.loads((folder / _INDEX).read_text())["weight_map"]
        files = [folder / name for name in sorted(set(shards.values()))]
    with ExitStack() as opened:
        try:
            handles = [opened.enter_context(safe_open(str(path), "pt")) for path in files]
            where = {name: file for file in handles for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ToolkitError(f"'{folder}' has no readable safetensors files ({first_line(error)}).") from None
        behind = [match for name in where if (match := _LAYER.match(name))]
        top = next((match for name in where if (match := _TOP.match(name))), None)
        if behind:
            path = min(behind, key=lambda match: int(match["index"]))["path"]
            around = {
                "enorm": "enorm.weight", "hnorm": "hnorm.weight", "eh_proj": "eh_proj.weight",
                "norm": "shared_head.norm.weight",
            }  # fmt: skip
            inner = path
        elif top is not None:
            path = top["path"]
            around = {
                "enorm": "pre_fc_norm_embedding.weight", "hnorm": "pre_fc_norm_hidden.weight", "eh_proj": "fc.weight",
                "norm": "norm.weight",
            }  # fmt: skip
            inner = f"{path}layers.0."
        else:
            raise ToolkitError(
                "method of speculative_config must be another than 'mtp' for a checkpoint without a multi-token "
                f"prediction layer, got '{folder}'."
            )
        missing = [name for name in around.values() if path + name not in where]
        if missing:
            raise ToolkitError(f"the multi-token prediction layer in '{folder}' lacks '{path}{missing[0]}'.")
        taken = {path + name for name in around.values()}
        layer = {
            name.removeprefix(inner): where[name].get_tensor(name)
            for name in where
            if name.startswith(inner) and name not in taken and not name.removeprefix(inner).startswith(_SHARED)
        }
        found = {part: where[path + name].get_tensor(path + name) for part, name in around.items()}
    packed = next((name for name, tensor in {**layer, **found}.items() if not tensor.dtype.is_floating_point), None)
    packed = packed or next((name for name, tensor in layer.items() if tensor.dtype.itemsize < 2), None)
    if packed is not None:
        raise ToolkitError(f"the multi-token prediction layer in '{folder}' must have 16 or 32 bits, got '{packed}'.")
    return _Parts(layer, found)


def _config(text: Any, layer: dict[str, Tensor]) -> Any:
    """The configuration of a model of that one layer, told by its tensors where the model's layers differ."""
    config = deepcopy(text)
    count, experts = config.num_hidden_layers, any(".experts." in name for name in layer)
    recurrent = not any(name.startswith("self_attn.") for name in layer)
    config.num_hidden_layers = 1
    for name, value in text.to_dict().items():
        if not isinstance(value, list | tuple) or len(value) != count or name.startswith("mtp_"):
            continue
        given = getattr(config, f"mtp_{name}", None)
        kinds = {"layer_types": "linear_attention" if recurrent else "full_attention"}
        kinds["mlp_layer_types"] = "sparse" if experts else "dense"
        one = given[0] if given else kinds.get(name, value[-1])
        setattr(config, name, [one if one in value or given else value[-1]])
    for name, value in (("first_k_dense_replace", int(not experts)), ("mlp_only_layers", [] if experts else [0])):
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def _norm(like: nn.Module, weight: Tensor) -> nn.Module:
    norm = deepcopy(like)
    norm.load_state_dict({"weight": weight.to(next(like.parameters()).dtype)})
    return norm


def _linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.load_state_dict({"weight": weight.to(dtype)}, assign=True)
    return linear
