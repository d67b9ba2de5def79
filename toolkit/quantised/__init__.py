"""Low-precision weights: one tensor that training, rollout, serving and export read.

``weight``: the tensor. ``model``: all weights of a model.
"""

from toolkit.quantised.model import (
    QuantisationReport,
    dense_state,
    dense_values,
    dequantise,
    quantise,
    quantised_weights,
)
from toolkit.quantised.weight import QuantisedWeight

__all__ = [
    "QuantisationReport", "QuantisedWeight", "dense_state", "dense_values", "dequantise", "quantise",
    "quantised_weights",
]  # fmt: skip
