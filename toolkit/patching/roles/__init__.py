"""One file per role: which modules of a model it claims, and how each is proven.

``FINDERS`` maps a role to a function of the model and the numerics mode that returns claims and skipped modules.
"""

from collections.abc import Callable, Sequence
from typing import Any

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, Skipped
from toolkit.patching.preserved import preserved
from toolkit.patching.roles import (
    activation,
    attention,
    encoder_attention,
    experts,
    head,
    layer,
    linear,
    media,
    mixer,
    mlp,
    norm,
    positions,
    rotary,
    router,
    written_attention,
)

Finder = Callable[[Any, Numerics], list[Claim | Skipped]]


def _find_attention(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """Layers by the attention interface; where it serves none, by what they write out."""
    with preserved(model) as replaced:
        found = attention.find(model, numerics)
        if not any(isinstance(one, Claim) for one in found):
            written = written_attention.find(model, numerics)
            if not any(isinstance(one, Claim) for one in written):
                written += found
            found = written
    if replaced:  # what was proven holds for other modules than the model's
        return [Skipped("attention", path, "a short forward replaces its children") for path in replaced]
    return found


FINDERS: dict[str, Finder] = {
    "norm": norm.find,
    "positions": positions.find,
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
    "media": media.find,
    "encoder_attention": encoder_attention.find,
}

DEFAULT = "default"
"""Among ``roles``: every role of ``DEFAULT_ROLES`` that the model has."""
DEFAULT_ROLES = [role for role in FINDERS if role != "encoder_attention"]
"""A tower's attention is taken where it is asked for: over thousands of patches torch's is a tenth faster."""


def wanted_roles(roles: Sequence[str] | None) -> dict[str, bool]:
    """The roles that ``roles`` names (None: ``DEFAULT``), in its order, and whether the model must have each.

    Raises:
        ToolkitError: an unknown role.
    """
    found: dict[str, bool] = {}
    for role in [DEFAULT] if roles is None else roles:
        if role == DEFAULT:
            found = {one: found.get(one, False) for one in [*found, *DEFAULT_ROLES]}
        elif role in FINDERS:
            found[role] = True
        else:
            raise ToolkitError(must_be_one_of("roles", role, [*FINDERS, DEFAULT]))
    return found
