"""Batches of sequences of which some have images."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from toolkit.patching.multimodal import MediaSequence


@dataclass(frozen=True)
class WithImages:
    """Sequences of text alone, then sequences with images.

    Attributes:
        texts: token ids of each sequence of text alone.
        pictured: what the model's processor made of each other sequence: ``input_ids`` [1, n], pixels, ...
        rotary_lengths: of every sequence, as ``RaggedBatch.from_sequences`` takes them.
    """

    texts: Sequence["Tensor"]
    pictured: Sequence[Mapping[str, Any]]
    rotary_lengths: Sequence[int] | None = None

    @classmethod
    def on(
        cls,
        device: "torch.device",
        texts: Sequence[Sequence[int]],
        pictured: Sequence[Mapping[str, Any]],
        rotary_lengths: Sequence[int] | None = None,
    ) -> "WithImages":
        """With what the processor made on a device."""
        import torch

        return cls(
            [torch.tensor(one) for one in texts],
            [{name: value.to(device) for name, value in one.items()} for one in pictured],
            rotary_lengths,
        )

    @property
    def sizes(self) -> list[int]:
        """Rows of each sequence."""
        return [len(one) for one in self.texts] + [int(one["input_ids"].shape[1]) for one in self.pictured]

    @property
    def num_tokens(self) -> int:
        """Rows of all sequences."""
        return sum(self.sizes)

    def split(self, rows: "Tensor") -> tuple["Tensor", list["Tensor"]]:
        """Rows of the whole, by part: of all texts together, then of each sequence with images."""
        begin = sum(len(one) for one in self.texts)
        texts, parts = rows[rows < begin], []
        for size in self.sizes[len(self.texts) :]:
            parts.append(rows[(rows >= begin) & (rows < begin + size)] - begin)
            begin += size
        return texts, parts


def proven_sequences(model: "nn.Module", pictured: Sequence[Mapping[str, Any]]) -> "list[MediaSequence] | None":
    """The sequences as parts of a ragged batch; None where a layout of theirs is refused, or parameters are sharded
    (the proof is a forward that other processes may not need)."""
    from toolkit.patching.multimodal import expand
    from toolkit.patching.sharding import is_sharded

    if is_sharded(model):
        return None
    try:
        return [expand(model, one) for one in pictured]
    except ToolkitError:
        return None


def image_logits(model: Any, inputs: Mapping[str, Any], rows: "Tensor") -> "Tensor":
    """Logits [len(rows), V] of one sequence with images, by the model's ordinary forward; towers train too."""
    given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    keep = {"logits_to_keep": rows} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    logits: Tensor = model(**given, use_cache=False, **keep).logits[0]
    return logits if keep else logits[rows]
