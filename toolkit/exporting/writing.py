"""A model written as a target holds it, with a manifest."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, first_line
from toolkit.exporting.base import (
    TARGETS,
    ConsumerOutput,
    ExportJob,
    ExportTarget,
    chosen_format,
    require_packages,
)
from toolkit.exporting.folders import check_free, new_folder
from toolkit.exporting.manifest import MANIFEST, manifest
from toolkit.patching.adapters import (
    active_adapter,
    adapter_names,
    adapter_parts,
    merged_adapters,
    without_adapters,
)
from toolkit.patching.sharding import check_unsplit
from toolkit.quantised import quantised_weights


def export(
    model: Any,
    path: str | Path,
    to: str = "hf",
    tokenizer: Any = None,
    quantise: str | None = None,
    prompts: Sequence[Sequence[int]] = (),
    max_tokens: int = 16,
    imatrix: str | Path | None = None,
) -> Path:
    """The folder ``path`` with ``model`` as a target holds it, written atomically, with a manifest.

    The manifest (``toolkit_manifest.json``) has the source, the weight version, versions of packages, a hash of every
    file, and the proof: what the target's own program generated for ``prompts``.

    Args:
        model: a model of transformers, patched or not. Targets of adapters take one of PEFT.
        path: a new or empty folder.
        to: the name of a target. "hf" is a plain Hugging Face checkpoint (safetensors, config, generation config, the
            tokenizer's files when one is given, and those of the checkpoint's processor), which unpatched transformers
            opens.
        tokenizer: saved beside the model.
        quantise: one of the target's formats; None takes the one that a quantised model has, else the first.
        prompts: token ids, which the target's program continues if it is installed; none run nothing.
        max_tokens: greedy tokens of each continuation.
        imatrix: for "gguf", a file of ``llama-imatrix`` by which columns are weighed where weights are rounded, or a
            text (UTF-8) over which the model is run to make one, ``imatrix.gguf`` in the folder.

    Raises:
        ToolkitError: an unknown target or format, a package that is missing, a path that already holds something or may
            not be written, a full disk, what the target cannot hold, or an export that its program does not run.
    """
    target = TARGETS.find("to", to)()
    check_unsplit(model, "an export")
    _check_dense(model, target)
    wanted = target.format_of(model) if quantise is None else quantise
    job = ExportJob(model, tokenizer, chosen_format(target, wanted), None if imatrix is None else Path(imatrix))
    folder = Path(path)
    check_free(folder)
    require_packages(target, job.quantise)
    if job.imatrix is not None:
        target.check_imatrix(job.imatrix, job.quantise)
    with _base_alone(model, target):
        target.check(job)
    with new_folder(folder) as staging:
        with _base_alone(model, target):
            target.write(job, staging)
        output = _consume(target, staging, prompts, max_tokens) if prompts else None
        content = manifest(job, to, target.packages(job.quantise), staging, prompts, output)
        (staging / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    return folder


@contextmanager
def _base_alone(model: Any, target: ExportTarget) -> Iterator[None]:
    """The model without the adapters that an engine has put beside its weights for requests to choose.

    Raises:
        ToolkitError: one is active or merged, or belongs to parameters that are no layer's.
    """
    if target.holds_adapters or hasattr(model, "peft_config") or not adapter_parts(model):
        yield
        return
    merged = sorted(merged_adapters(model))
    acting = merged[0] if merged else active_adapter(model)
    with nullcontext() if acting is not None else without_adapters(model):
        if adapter_parts(model):
            found = ", ".join([acting] if acting is not None else adapter_names(model)) or "an adapter's wrappers"
            raise ToolkitError(
                f"model must have no adapter in it to be exported to {target.target!r}, got {found}; unload it first."
            )
        yield


def _check_dense(model: Any, target: ExportTarget) -> None:
    """Raise ToolkitError for quantised weights, but where the target takes them or holds adapters alone."""
    found = [] if target.holds_adapters or target.takes_quantised else list(quantised_weights(model))
    if found:
        name, weight = found[0]
        raise ToolkitError(
            f"model must be dense to be exported to {target.target!r}, got {name} in {weight.format}; dequantise it "
            "first (toolkit.quantised.dequantise)."
        )


def _consume(
    target: ExportTarget, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int
) -> ConsumerOutput | None:
    """What the target's program generates; one that fails is an error, and the export is not kept."""
    try:
        return target.consume(folder, prompts, max_tokens)
    except ToolkitError:
        raise
    except Exception as error:  # programs raise their own
        reason = first_line(error, with_class=True)
        raise ToolkitError(f"The program of {target.target!r} does not run the export ({reason}).") from None
