"""What an export target is: a format that another program opens."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.registry import Registry


@dataclass(frozen=True)
class ExportJob:
    """What is exported.

    Attributes:
        model: of transformers, patched or not; of PEFT for targets that hold adapters alone.
        tokenizer: of the model, or None.
        quantise: one of the target's ``formats``, None where it has none.
        imatrix: a file of importances of columns, or a text that they are computed from; None for equal ones.
    """

    model: Any
    tokenizer: Any = None
    quantise: str | None = None
    imatrix: Path | None = None


Outputs = list[list[int]] | list[list[float]]


class ConsumerOutput(NamedTuple):
    """What a program generated from an export.

    Attributes:
        consumer: the program and its version, such as "transformers 5.23.0".
        outputs: greedy token ids, one list per prompt; of a model that generates nothing, its output.
    """

    consumer: str
    outputs: Outputs


class ExportTarget(ABC):
    """A format of other programs. ``class HuggingFace(ExportTarget, name="hf")`` registers it under a name."""

    target: ClassVar[str]
    """The name that it is registered under."""
    formats: ClassVar[tuple[str, ...]] = ()
    """Values of ``quantise``; the first is taken where none is given. None: weights keep their dtype."""
    lossless: ClassVar[tuple[str, ...]] = ()
    """Formats that keep float32 weights as they are; a target without formats keeps them, too."""
    holds_adapters: ClassVar[bool] = False
    """Whether it is made of a PEFT model's adapters, without the base model."""

    takes_quantised: ClassVar[bool] = False
    """Whether a model with quantised weights may be given; it is exported with the values that it computes with."""

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            cls.target = name
            TARGETS.add(name, cls)

    def format_of(self, model: Any) -> str | None:
        """The format that a quantised model has already; None for another one."""
        return None

    def packages(self, quantise: str | None) -> tuple[str, ...]:
        """Modules outside of the toolkit's own dependencies that writing needs."""
        return ()

    def check_imatrix(self, file: Path, quantise: str | None) -> None:
        """Raise ToolkitError where the target does not weigh columns, or not by this file, in this format."""
        raise ToolkitError(f"imatrix must not be given for {self.target!r}, got '{file}'; 'gguf' takes one.")

    def check(self, job: ExportJob) -> None:
        """Raise ToolkitError, naming it, for what the target cannot hold. Called before anything is written."""
        return

    @abstractmethod
    def write(self, job: ExportJob, folder: Path) -> None:
        """Write the model, and the tokenizer if there is one, into the new, empty ``folder``."""

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput | None:
        """Greedy tokens of the program that the target is for; None where it is not installed here.

        Args:
            folder: that ``write`` filled.
            prompts: token ids.
            max_tokens: to generate for each, end-of-text tokens included.
        """
        return None


TARGETS: Registry[ExportTarget] = Registry("toolkit.exporting")


def chosen_format(target: ExportTarget, quantise: str | None) -> str | None:
    """The format that ``quantise`` asks of a target.

    Raises:
        ToolkitError: one that the target does not have.
    """
    if quantise is None:
        return target.formats[0] if target.formats else None
    if not target.formats:
        raise ToolkitError(f"quantise must not be given for {target.target!r}, whose weights keep their dtype.")
    if quantise not in target.formats:
        raise ToolkitError(must_be_one_of("quantise", quantise, target.formats))
    return quantise


def is_lossless(target: ExportTarget, quantise: str | None) -> bool:
    """Whether the target's weights are those of a float32 model, so that its consumer generates the same tokens."""
    return not target.formats or chosen_format(target, quantise) in target.lossless


_OF_EXTRA = ("gguf", "libgguf", "compressed_tensors")
"""Modules that come with the extra ``export``."""


def require_packages(target: ExportTarget, quantise: str | None) -> None:
    """Raise ToolkitError, in one sentence, where packages that writing needs are missing."""
    missing = [package for package in target.packages(quantise) if importlib.util.find_spec(package) is None]
    if missing:
        what = "package" if len(missing) == 1 else "packages"
        named = " and ".join(f"'{package}'" for package in missing)
        install = dict.fromkeys('"train-infer-toolkit[export]"' if one in _OF_EXTRA else one for one in missing)
        raise ToolkitError(f"An export to {target.target!r} needs the {what} {named}: pip install {' '.join(install)}.")
