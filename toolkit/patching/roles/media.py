"""Images: the module where a model's own forward hands merged embeddings to its text part."""

from functools import partial
from typing import Any

from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, ProbeError, Skipped
from toolkit.patching.multimodal.entry import install
from toolkit.patching.text_part import find_entry


def find(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """The claim on the entry of a model with towers; none for a text model. Its probe is the first image itself."""
    found = find_entry(model)
    if found is None:
        return []
    path, entry = found
    return [Claim("media", path, entry, "rows as embeddings", ProbeError(0.0, 0.0), partial(install, entry))]
