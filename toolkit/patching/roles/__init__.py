"""One file per role: which modules of a model it claims, and how each is proven.

``FINDERS`` maps a role to a function of the model and the numerics mode that returns claims and skipped modules.
"""

from collections.abc import Callable
from typing import Any

from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, Skipped
from toolkit.patching.roles import activation, attention, experts, head, layer, linear, mixer, mlp, norm, rotary, router

Finder = Callable[[Any, Numerics], list[Claim | Skipped]]

FINDERS: dict[str, Finder] = {
    "norm": norm.find,
    "rotary": rotary.find,
    "mlp": mlp.find,
    "activation": activation.find,
    "router": router.find,
    "experts": experts.find,
    "attention": attention.find,
    "mixer": mixer.find,
    "layer": layer.find,
    "linear": linear.find,
    "head": head.find,
}
