"""Padding behind the tokens of a row, which attention leaves zero, and labels that count there.

Hardly anybody reads what padding predicts. Where labels count on it (``labels=input_ids`` of a padded batch), attention
computes those rows as well: a hook sees labels and mask before the forward.
"""

import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.ops import IGNORED

_READ: ContextVar[bool] = ContextVar("rows_of_padding_are_read", default=False)


class LabelsOnPadding:
    """A forward pre-hook of a model: notes whether labels count on padding of the forward that begins."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            _READ.set(_count_on_padding(module, args, kwargs))


def _count_on_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if args:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs = dict(zip(names, args)) | kwargs
    mask, ignored = kwargs.get("attention_mask"), kwargs.get("ignore_index", IGNORED)
    given = [one for name in ("labels", "shift_labels") if isinstance(one := kwargs.get(name), Tensor)]
    if not given or not isinstance(mask, Tensor):
        return False
    return any(
        mask.shape == labels.shape and bool(((labels != ignored).to(mask.device) & (mask == 0)).any())
        for labels in given
    )


def padding_is_read() -> bool:
    """Whether somebody reads rows of padding of the forward under way."""
    return _READ.get()
