"""A processor's outputs with little of the text between their images: what the proof of a layout runs over.

An engine's other requests wait for the proof, which takes the time of two forwards. Its text says nothing about images
but for the tokens beside them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.patching.multimodal.items import Processed

NEAR = 32
"""Tokens of text that stay at both ends, beside each image, and where numbers of tokens change."""


def shortened(processed: Processed, outputs: Mapping[str, Any], placeholders: Mapping[str, int]) -> Any:
    """The outputs without tokens far from images; None where nothing would be left out or the layout be another.

    Args:
        processed: the outputs, taken apart.
        placeholders: the token ids that stand for images, by modality.
    """
    count = len(processed.ids)
    kept = torch.zeros(count, dtype=torch.bool)
    for kind in processed.media:
        kept[torch.from_numpy(processed.rows_of(kind, placeholders))] = True
    for numbers in processed.token_arguments.values():
        kept[1:] |= (numbers[0, 1:] != numbers[0, :-1]).cpu()
    kept[0] = kept[-1] = True
    beside = torch.nn.functional.max_pool1d(kept[None].float(), 2 * NEAR + 1, 1, NEAR)[0] > 0
    if bool(beside.all()):
        return None
    found = dict(outputs)
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == (1, count):
            if value.dim() > 2:  # of each token and each image, or images that are as many
                return None
            found[name] = value[:, beside.to(value.device)]
    return found if Processed.of(found).layout() == processed.layout() else None
