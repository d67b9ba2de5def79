"""One file per role: which modules of a model it claims, and how each is proven.

``FINDERS`` maps a role to a function of the model and the numerics mode that returns claims and skipped modules.
"""

from collections.abc import Callable
from typing import Any

from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, Skipped
from toolkit.patching.roles import (
    activation,
    attention,
    experts,
    head,
    layer,
    linear,
    mixer,
    mlp,
    norm,
    rotary,
    router,
    written_attention,
)

Finder = Callable[[Any, Numerics], list[Claim | Skipped]]


def _find_attention(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """Layers by the attention interface; where it serves none, by what they write out."""
    found = attention.find(model, numerics)
    if any(isinstance(one, Claim) for one in found):
        return found
    written = written_attention.find(model, numerics)
    return written if any(isinstance(one, Claim) for one in written) else found + written


FINDERS: dict[str, Finder] = {
    "norm": norm.find,
    "rotary": rotary.find,
    "mlp": mlp.find,
    "activation": activation.find,
    "router": router.find,
    "experts": experts.find,
    "attention": _find_attention,
    "mixer": mixer.find,
    "layer": layer.find,
    "linear": linear.find,
    "head": head.find,
}
