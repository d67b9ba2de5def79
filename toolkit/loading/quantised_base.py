"""Adapters that were trained on a quantised base model: a file beside them says how, and merging follows it."""

import json
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.loading.source import read_json

QUANTISED_BASE = "quantised_base.json"


def write_quantised_base(folder: Path, settings: dict[str, Any]) -> None:
    """Say beside adapters how their base model is quantised.

    Args:
        settings: arguments of ``toolkit.quantise``, ``options`` as a dictionary, and the ``dtype`` of the weights that
            were quantised.
    """
    (folder / QUANTISED_BASE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def quantise_base_of(model: Any, folder: Path) -> None:
    """Give a dense base model the values that the adapters in ``folder`` were trained on, in place, dense still.

    Nothing where no file says that they were quantised.

    Raises:
        ToolkitError: a malformed file.
    """
    file = folder / QUANTISED_BASE
    if not file.is_file():
        return
    import torch

    from toolkit.quantised import dequantise, quantise

    settings, dtype = read_json(file), model.dtype
    try:
        model.to(getattr(torch, settings["dtype"]))
        quantise(model, settings["format"], settings["include"], settings["exclude"], **settings["options"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ToolkitError(f"'{file}' does not say how the base model is quantised ({error!r}).") from None
    model.to(dtype)
    dequantise(model)
