"""A recipe's ``model.quantise``: a frozen base for adapters, or weights that are trained through their rounding."""

from typing import TYPE_CHECKING

from toolkit.config.schema import ModelSection
from toolkit.quantised import QuantisationReport, quantise, quantised_weights
from toolkit.training.precision import Masters

if TYPE_CHECKING:
    from torch import nn


def quantise_model(model: "nn.Module", section: ModelSection, masters: Masters) -> QuantisationReport | None:
    """Quantise the weights in place as a recipe says: what was done; None where it says nothing.

    Without adapters the weights are trained, and are the rounding of their values in ``masters``.

    Args:
        masters: values in float32 of parameters that were rounded to 16 bits; those of quantised weights join them.
    """
    if section.quantise is None:
        return None
    before = dict(model.named_parameters())
    exact = {name: masters[parameter] for name, parameter in before.items() if parameter in masters}
    wanted = section.quantise
    report = quantise(
        model, wanted.format, wanted.include, wanted.exclude, trainable=section.lora is None, **wanted.options
    )
    for name, weight in quantised_weights(model):
        if name in exact:
            del masters[before[name]]
            if weight.requires_grad:
                weight.quantise_(exact[name])
                report.masters[model.get_parameter(name)] = exact[name]
    masters |= report.masters
    return report


def train_quantised(model: "nn.Module") -> None:
    """Let the quantised weights of a loaded model be trained."""
    for _, weight in quantised_weights(model):
        weight.requires_grad_()
