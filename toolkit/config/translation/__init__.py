"""Settings of TRL and Axolotl as recipes: ``toolkit init --from FILE``.

``base``      a recipe in the making, and what became of each key
``arguments`` keys that both share: transformers' ``TrainingArguments`` and adapters
``objectives`` what is minimised, by TRL's names
``processes`` how several share the model
``trl``, ``axolotl`` one file per program
"""

from collections.abc import Mapping
from typing import Any

from toolkit.config.translation import axolotl, trl
from toolkit.config.translation.base import Note, Translation
from toolkit.errors import ToolkitError

__all__ = ["Note", "Translation", "translate"]


def translate(settings: Mapping[str, Any], kind: str | None = None) -> Translation:
    """The recipe that other programs' settings ask for, and notes on every key that it does not have.

    Args:
        settings: of Axolotl where they have ``base_model``, else of TRL's command line.
        kind: of the objective; None where the settings say it. (TRL's say it on the command line only: ``trl dpo``.)

    Raises:
        ToolkitError: settings of neither, or what a recipe cannot say without another key.
    """
    if "base_model" in settings:
        return axolotl.translate(settings, kind)
    if "model_name_or_path" in settings:
        return trl.translate(settings, kind)
    raise ToolkitError("The settings must have model_name_or_path (TRL) or base_model (Axolotl), got neither.")
