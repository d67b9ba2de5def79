"""The recipe's model: random weights of a transformers architecture, or a local checkpoint, patched."""

import inspect
import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolkit.config import Recipe
from toolkit.config.schema import ModelSection
from toolkit.errors import ToolkitError, first_line, nearest
from toolkit.loading import find_source, load_weights
from toolkit.loading.model import GENERATION_CONFIG, quiet_transformers
from toolkit.loading.quantised_base import write_quantised_base
from toolkit.loading.quantised_codes import write_codes
from toolkit.moe.observer import RouterObserver, observing
from toolkit.patching import (
    IndexLosses,
    PatchReport,
    ReadLogits,
    index_losses,
    patch,
    ragged_forward,
    sequence_readings,
    token_logprobs,
    weights_changed,
)
from toolkit.patching.adapters import fuse_adapters, vocabulary_size
from toolkit.patching.multimodal import MediaSequence, media_batch
from toolkit.patching.sharding import is_sharded
from toolkit.quantised import dense_state, quantised_weights
from toolkit.state.batch import RaggedBatch
from toolkit.training.adapters import add_adapters, load_adapters, save_adapters
from toolkit.training.images import WithImages, image_logits, proven_sequences
from toolkit.training.score_model import HEADS, load_score_model, make_score_model, sequence_scores

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from toolkit.training.tokenizer import Tokenizer


class RaggedModel(nn.Module):
    """A patched causal language model as a function of a ragged batch; what accelerate and DDP wrap.

    Attributes:
        observer: takes statistics of the routers in forwards with gradients; None for none.
        index_losses: takes the losses of indexers in forwards with gradients; None where they are not wanted.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model
        self.observer: RouterObserver | None = None
        self.index_losses: IndexLosses | None = None

    def forward(
        self,
        batch: RaggedBatch | WithImages | list[list[int]],
        rows: Tensor | None = None,
        last: list[int] | None = None,
        routing: list[Tensor] | None = None,
        rotary_lengths: list[int | None] | None = None,
        selection: list[Tensor] | None = None,
        scores: bool = False,
        reading: ReadLogits | None = None,
    ) -> Any:
        """Logits [T, V] of every token of a batch, or [len(rows), V] of those rows.

        Of a list of sequences: the log-probabilities of the last ``last[i]`` tokens of each, as ``token_logprobs``
        returns them; common prefixes are computed once.

        Args:
            rows: rows of the batch whose logits are wanted.
            last: tokens of each sequence whose log-probabilities are wanted.
            routing: the experts of each sequence's tokens.
            rotary_lengths: of each sequence, see ``token_logprobs``.
            selection: the keys that each sequence's tokens attend.
            scores: return the score [S] of each sequence, or those [T, N] of each token, of a model with such a head.
            reading: what is returned of those tokens in the place of log-probabilities: a list for each of its outputs.
        """
        observed = torch.is_grad_enabled()
        indexers = nullcontext() if self.index_losses is None else index_losses(self.index_losses)
        with observing(self.observer if observed else None), indexers if observed else nullcontext():
            if isinstance(batch, list) and scores:
                return sequence_scores(self.model, batch)
            if isinstance(batch, list):
                given: dict[str, Any] = {"last": last, "routing": routing, "selection": selection}
                if reading is not None:
                    return sequence_readings(self.model, batch, reading, rotary_lengths=rotary_lengths, **given)
                return token_logprobs(self.model, batch, rotary_lengths=rotary_lengths, **given)
            if isinstance(batch, WithImages):
                if observed and is_sharded(self.model):
                    raise ToolkitError(
                        "train.distributed must be 'ddp', 'zero1' or 'zero2' for data with images, whose layers do not "
                        "run the same number of times in every process."
                    )
                return self._with_images(batch, rows)
            return ragged_forward(self.model, batch, rows)

    def _with_images(self, batch: WithImages, rows: Tensor | None) -> Tensor:
        """Logits of the wanted rows, which ascend: one ragged forward, in which each distinct image goes through the
        tower once; a model whose images are refused there takes an ordinary call per sequence with images."""
        device = next(self.model.parameters()).device
        if rows is None:
            rows = torch.arange(batch.num_tokens, device=device)
        proven = proven_sequences(self.model, batch.pictured)
        if proven is not None:
            parts: list[Tensor | MediaSequence] = [*batch.texts, *proven]
            return ragged_forward(self.model, media_batch(self.model, parts, False, None, batch.rotary_lengths), rows)
        own, pictured = batch.split(rows)
        logits = [image_logits(self.model, one, wanted) for one, wanted in zip(batch.pictured, pictured)]
        if batch.texts:
            lengths = None if batch.rotary_lengths is None else batch.rotary_lengths[: len(batch.texts)]
            texts = RaggedBatch.from_sequences(batch.texts, device, share=False, rotary_lengths=lengths)
            logits = [ragged_forward(self.model, texts, own), *logits]
        return torch.cat(logits)


def make_model(
    section: ModelSection, tokenizer: "Tokenizer", max_length: int, head: str = "tokens", added_tokens: bool = False
) -> "PreTrainedModel":
    """The unpatched model in training mode. Random weights come from torch's global generator.

    ``head``: tokens, or one of ``HEADS``. ``added_tokens``: a loaded model grows to the vocabulary.

    The vocabulary and the special tokens come from the tokenizer; a vocabulary given in ``model.config`` may
    be larger. Raises ToolkitError for a configuration that transformers does not know or accept, a path
    without a checkpoint, a vocabulary too small, or positions fewer than ``max_length``.
    """
    if section.config is not None:
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel
        config = make_config(section.config, tokenizer)
        try:
            if head in HEADS:
                model = make_score_model(config, section.dtype, head)
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, section.dtype))
        except Exception as error:  # a combination of fields that only the model's own code refuses
            raise ToolkitError(f"model.config makes no model: {first_line(error)}.") from None
    else:
        assert section.name_or_path is not None
        model = load_checkpoint(
            section.name_or_path, section.dtype, "model.name_or_path", section.revision, section.trust_remote_code, head
        )
    if head in HEADS and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # of a batch's other sequences, elsewhere
    rows = vocabulary_size(model)
    if rows < len(tokenizer) and added_tokens and section.config is None:
        with quiet_transformers():
            model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
        rows = vocabulary_size(model)
    if rows < len(tokenizer):
        field = "model.config.vocab_size" if section.config is not None else "the model's vocabulary size"
        raise ToolkitError(f"{field} must be >= the tokenizer's, which is {len(tokenizer)}, got {rows}.")
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < max_length:
        raise ToolkitError(
            f"train.max_length must be <= the model's max_position_embeddings, which is {positions}, got {max_length}."
        )
    generation = generation_config_of(model)
    if generation is not None:
        if section.config is not None or generation.bos_token_id is None:
            generation.bos_token_id = tokenizer.bos_token_id
        if section.config is not None or generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
        if section.config is not None:
            generation.eos_token_id = None
        add_eos_token_ids(model, [tokenizer.eos_token_id])
    model.train()
    return model


def generation_config_of(model: "PreTrainedModel") -> "GenerationConfig | None":
    """None of a model that predicts no tokens."""
    return getattr(model, "generation_config", None)


def eos_token_ids(model: "PreTrainedModel") -> list[int]:
    """The tokens at which generation stops, in order."""
    generation = generation_config_of(model)
    ids = generation.eos_token_id if generation is not None else None
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def add_eos_token_ids(model: "PreTrainedModel", ids: Iterable[int]) -> None:
    """Let generation stop at these tokens, too; checkpoints keep the list."""
    generation = generation_config_of(model)
    if generation is not None:
        found = list(dict.fromkeys([*eos_token_ids(model), *ids]))
        generation.eos_token_id = found[0] if len(found) == 1 else found


def make_config(fields: dict[str, Any], tokenizer: "Tokenizer") -> "PretrainedConfig":
    """A transformers configuration from a recipe's fields.

    Raises ToolkitError for a field that its ``model_type`` does not have, or a value it refuses.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = dict(fields)
    model_type = values.pop("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(model_type, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        raise ToolkitError(
            f"model.config.model_type must be a causal language model of transformers, got '{model_type}'{hint or '.'}"
        )
    default = AutoConfig.for_model(model_type)
    # Some fields are in no configuration's defaults, but the model's own code looks for them.
    source = inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(default)].__module__])
    looked_for = [a or b for a, b in re.findall(r'config\.(\w+)|getattr\((?:self\.)?config, "(\w+)"', source)]
    known = sorted({*default.to_dict(), *getattr(default, "attribute_map", {}), *looked_for})
    for field in values:
        if field not in known:
            raise ToolkitError(
                f"Unknown field 'model.config.{field}' for model type '{model_type}'{nearest(field, known) or '.'}"
            )
    values.setdefault("vocab_size", len(tokenizer))
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(token, getattr(tokenizer, token))
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # transformers validates with many kinds of exception
        raise ToolkitError(f"model.config is refused by transformers: {first_line(error)}.") from None


def load_checkpoint(
    name_or_path: str | Path,
    dtype: str,
    field: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    head: str = "tokens",
) -> "PreTrainedModel":
    """The causal language model of a checkpoint in eval mode: see ``toolkit.loading.load_model``.

    ``head``: tokens, or one of ``HEADS``.
    Raises ToolkitError, naming ``field``, where there is none, and for weights that lack a tensor.
    """
    if head in HEADS:
        return load_score_model(name_or_path, dtype, field, revision, trust_remote_code, head)
    source = find_source(name_or_path, revision=revision, trust_remote_code=trust_remote_code, field=field)
    model: PreTrainedModel = load_weights(source, dtype)
    model.adapted_base = source.name  # type: ignore[assignment]
    return model


def patch_model(
    model: "PreTrainedModel", section: ModelSection, saved: Path | None = None
) -> tuple[RaggedModel, PatchReport]:
    """Patch in place for the recipe's roles and numerics mode, and add the adapters that the recipe asks for.

    ``saved``: the checkpoint that has them; None to begin.

    Layers are recognised by their linear parts, which PEFT wraps, so the patch comes first: patched forwards call their
    projections as modules, and wrapped ones are called like others. The adapters' GEMMs follow the numerics mode; those
    of experts' parameters are grouped like the experts' own.
    """
    report = patch(model, section.roles, section.numerics, section.kv_cache_dtype)
    if section.lora is not None:
        add_adapters(model, section.lora, saved)
        fuse_adapters(model, report.numerics)
        weights_changed(model)
    return RaggedModel(model), report


def checkpoint_layers(model: "PreTrainedModel") -> None:
    """Let a patched model's layers be computed again in the backward.

    Raises ToolkitError for a model whose layers cannot be.
    """
    if not model.supports_gradient_checkpointing:
        raise ToolkitError(f"train.gradient_checkpointing must be false for {type(model).__name__}, got true.")
    model.gradient_checkpointing_enable({"use_reentrant": False})


def load_weights_of(model: "PreTrainedModel", folder: Path, recipe: Recipe, head: str) -> None:
    """Give a run's model the weights of one of its checkpoints, in place."""
    if recipe.model.lora is not None:
        load_adapters(model, folder)
    else:
        model.load_state_dict(load_checkpoint(folder, recipe.forward_dtype, "the checkpoint", head=head).state_dict())
    weights_changed(model)


def save_model(model: "PreTrainedModel", folder: Path, section: ModelSection) -> None:
    """The model as a checkpoint of transformers; one with adapters as PEFT saves it: the adapters alone.

    Quantised weights are dense in it, and their codes lie beside it; beside adapters lies how their base is quantised.
    """
    adapters = section.lora is not None
    quantised = not adapters and any(quantised_weights(model))
    if adapters:
        save_adapters(model, folder)
    else:
        with quiet_transformers():
            model.save_pretrained(str(folder), state_dict=dense_state(model) if quantised else None)
    if quantised:
        write_codes(model, folder)
    if adapters and section.quantise is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        write_quantised_base(folder, {**section.quantise.model_dump(), "dtype": dtype})
    generation = generation_config_of(model)
    if generation is not None and not (folder / GENERATION_CONFIG).is_file():
        # Of adapters, whose base model may stop at fewer tokens.
        (folder / GENERATION_CONFIG).write_text(generation.to_json_string(), encoding="utf-8")
