"""Batches of sequences of which some have images."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolkit.state.batch import RaggedBatch


@dataclass(frozen=True)
class WithImages:
    """Sequences of text alone as one ragged batch, then sequences with images, each an ordinary call of the model.

    Attributes:
        texts: None without any.
        pictured: what the model's processor made of each sequence: ``input_ids`` [1, n], pixels, ...
    """

    texts: "RaggedBatch | None"
    pictured: Sequence[Mapping[str, Any]]

    @classmethod
    def on(
        cls, device: "torch.device", texts: "RaggedBatch | None", pictured: Sequence[Mapping[str, Any]]
    ) -> "WithImages":
        """With everything on a device."""
        return cls(texts, [{name: value.to(device) for name, value in one.items()} for one in pictured])

    @property
    def num_tokens(self) -> int:
        """Rows of all sequences."""
        before = 0 if self.texts is None else len(self.texts.tokens)
        return before + sum(int(one["input_ids"].shape[1]) for one in self.pictured)

    def split(self, rows: "Tensor") -> list["Tensor"]:
        """Rows of the whole by part: those of the ragged batch, then those of each sequence with images."""
        sizes = [0 if self.texts is None else len(self.texts.tokens)]
        sizes += [one["input_ids"].shape[1] for one in self.pictured]
        parts, begin = [], 0
        for size in sizes:
            parts.append(rows[(rows >= begin) & (rows < begin + size)] - begin)
            begin += size
        return parts


def image_logits(model: Any, inputs: Mapping[str, Any], rows: "Tensor") -> "Tensor":
    """Logits [len(rows), V] of one sequence with images, by the model's ordinary forward; towers train too."""
    given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    keep = {"logits_to_keep": rows} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    logits: Tensor = model(**given, use_cache=False, **keep).logits[0]
    return logits if keep else logits[rows]
