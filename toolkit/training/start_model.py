"""The model that a run begins or continues with: loaded or made, frozen, rounded and quantised as its recipe says."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed

from toolkit.config import Recipe
from toolkit.training.adapters import add_adapters
from toolkit.training.freezing import freeze_parameters
from toolkit.training.model import load_checkpoint, make_model
from toolkit.training.precision import Masters, lower_precision, move_to_fresh_memory
from toolkit.training.quantising import quantise_model, train_quantised
from toolkit.training.resume import Start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolkit.training.tokenizer import Tokenizer


class StartModel:
    """Makes a run's model.

    Args:
        recipe: of the run.
        tokenizer: of the run.
        head: "tokens", or one of ``HEADS``.
        warmed_up: the checkpoint of the warm-up, None without one.
    """

    def __init__(self, recipe: Recipe, tokenizer: "Tokenizer", head: str, warmed_up: Path | None) -> None:
        self._recipe, self._tokenizer, self._head, self._warmed_up = recipe, tokenizer, head, warmed_up

    def initial(self) -> "PreTrainedModel":
        """The model that training starts from: after the warm-up, from ``model.name_or_path``, or random.

        Adapters that training continues are in it.
        """
        model, section = self._whole(), self._recipe.model
        freeze_parameters(model, section)
        quantise_model(model, section, lower_precision(model, self._recipe.forward_dtype))
        if section.lora is not None and section.lora.adapter is not None:
            add_adapters(model, section.lora)
        return model

    def _whole(self) -> "PreTrainedModel":
        """The initial model in ``model.dtype``."""
        section = self._recipe.model
        with torch.random.fork_rng():
            set_seed(self._recipe.seed)
            if self._warmed_up is not None:
                model = load_checkpoint(self._warmed_up, section.dtype, "the warm-up", head=self._head)
                model.train()
                return model
            recipe, grows = self._recipe, bool(self._recipe.tokenizer.added_tokens)
            return make_model(section, self._tokenizer, recipe.train.max_length, self._head, grows)

    def make(self, start: Start | None, log: Callable[[str], None]) -> "tuple[PreTrainedModel, Masters | None]":
        """The model to train, unpatched, and the float32 values of what its forward reads rounded; None without any.

        Args:
            start: to continue from.
            log: is told what is frozen and quantised.
        """
        recipe = self._recipe
        if new := start is None or recipe.model.lora is not None:
            model = self._whole()
        else:
            model = load_checkpoint(start.checkpoint, recipe.forward_dtype, "the checkpoint", head=self._head).train()
        if recipe.trains_quantised:
            train_quantised(model)
        frozen = freeze_parameters(model, recipe.model)
        if frozen is not None:
            log(f"frozen: {frozen}")
        masters = lower_precision(model, recipe.forward_dtype)
        move_to_fresh_memory(model)
        if new and (report := quantise_model(model, recipe.model, masters)):
            log(f"quantised: {report}")
        return model, None if recipe.train.mixed_precision == "no" and not recipe.trains_quantised else masters
