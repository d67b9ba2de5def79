"""A row of a model of images and text."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from toolkit.engine import Completion, Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.exporting import export
from toolkit.patching import patch, token_logprobs, unpatch
from toolkit.patching.without_media import asks_for_media, text_arguments
from toolkit.testing.architectures import IMAGE_TEXT, small_model
from toolkit.testing.coverage.measuring import NEW_TOKENS, greedy, loss_and_gradient, next_logprobs, relative, text
from toolkit.testing.coverage.row import Column, Row
from toolkit.testing.image_inputs import image_batch
from toolkit.testing.models import exact_attention

NO_TEXT = "n/a"
"""In the columns of text, of a model that takes none alone."""
COLUMNS = (
    Column(
        "text loss",
        f"relative difference from the unpatched model's loss on text; {NO_TEXT} where its forward asks for an image "
        "with any text",
        1e-5,
    ),
    Column("text gradient", "the same of all gradients together, by norm", 1e-4),
    Column("image loss", "the same of the loss on text with an image in it", 1e-5),
    Column("image gradient", "the same of all gradients, those of the tower included", 1e-4),
    Column(
        "log-probability",
        "largest difference of `token_logprobs` with an image from the unpatched model's, nats",
        1e-4,
    ),
    Column("greedy", f"the engine's {NEW_TOKENS} greedy tokens after an image are those of the unpatched `generate`"),
    Column("differing", "tokens whose log-probability after an image differs in a bit between engine and training", 0),
    Column("export", "an export has the tensors of the checkpoint under their names, and gives the same logits"),
)


def measure(model_type: str) -> Row:
    """One architecture's row; what cannot be measured does not keep the rest from it."""
    row, begun = Row(model_type, COLUMNS), time.monotonic()
    try:
        _measure(model_type, row)
    finally:
        row.seconds = round(time.monotonic() - begun, 1)
    return row


def _measure(model_type: str, row: Row) -> None:
    stage = "no small model can be built"
    try:
        model = small_model(model_type, kind=IMAGE_TEXT)
        row.name = type(model).__name__
        stage = "the small model's unpatched forward fails"
        inputs = image_batch(model)
        image_loss, image_gradient = loss_and_gradient(model, inputs, _labels(inputs))
        if not math.isfinite(float(image_loss)):
            raise ToolkitError("the loss is not finite")
        stage = "the small model's unpatched forward of text fails"
        words = None if asks_for_media(model) else _text_inputs(model, inputs)
        if words is not None:
            text_loss, text_gradient = loss_and_gradient(model, words, words["input_ids"])
        stage = "patch"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = _tensors(Path(folder))
        stock = next_logprobs(model, inputs)
        report = patch(model)
        row.roles = report.roles()
        row.probe_error = report.worst_error()
        row.skipped = [f"{role} {path}: {reason}" for role, path, _, reason in report.skipped_rows()]
    except Exception as problem:
        return row.failed(stage, problem)
    try:
        stage = "patched forward of text"
        row.values["text loss"] = row.values["text gradient"] = NO_TEXT
        if words is not None:
            got, patched = loss_and_gradient(model, words, words["input_ids"])
            row.values["text loss"] = relative(got, text_loss)
            row.values["text gradient"] = relative(patched, text_gradient)
        stage = "patched forward with an image"
        got, patched = loss_and_gradient(model, inputs, _labels(inputs))
        row.values["image loss"] = relative(got, image_loss)
        row.values["image gradient"] = relative(patched, image_gradient)
        stage = "ragged batch with an image"
        with torch.no_grad():
            (found,) = token_logprobs(model, [inputs["input_ids"][0].tolist()], images=[inputs])
        row.values["log-probability"] = float((found - stock).abs().max())
        unpatch(model)
        stage = "transformers' generate with an image"
        expected = greedy(model, inputs)
        patch(model)
        stage = "engine with an image"
        row.values["greedy"] = _completions(model, [inputs], temperature=0.0)[0].token_ids == expected
        row.values["differing"] = _differing(model, inputs)
    except Exception as problem:
        row.failed(stage, problem)
    try:
        row.values["export"] = _reloads(model, saved, inputs)
    except Exception as problem:
        row.failed("export", problem)


def _completions(model: Any, prompts: list[Any], **params: Any) -> list[Completion]:
    given = [SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, seed=at, **params) for at in range(len(prompts))]
    with Engine(model, max_num_seqs=3, max_num_batched_tokens=1024, block_size=4) as engine:
        found = engine.generate(prompts, given)
    for completion in found:
        if completion.error is not None:
            raise ToolkitError(completion.error)
    return found


def _differing(model: Any, inputs: dict[str, Tensor]) -> int:
    """Sampled tokens behind an image, and behind text beside it, whose log-probability differs from training's."""
    prompts = [inputs, inputs, text(7, 1, 40, 260)[0].tolist(), inputs]
    found = _completions(model, prompts)
    with torch.no_grad():
        trained = token_logprobs(
            model,
            [one.prompt_token_ids + one.token_ids for one in found],
            last=[len(one.token_ids) for one in found],
            images=[one if isinstance(one, dict) else None for one in prompts],
        )
    return sum(int((torch.tensor(one.logprobs) != other).sum()) for one, other in zip(found, trained, strict=True))


def _labels(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["input_ids"] if "input_ids" in inputs else inputs["decoder_input_ids"]


def _text_inputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Inputs of the same names without the image, for a model that asks for them with text too."""
    ids = text(13, 2, 40, 260)
    kinds = [name for name in inputs if name.endswith("token_type_ids")]
    return {"input_ids": ids, **{name: torch.zeros_like(ids) for name in kinds}, **text_arguments(model, ids)}


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _reloads(model: Any, saved: dict[str, Tensor], inputs: dict[str, Tensor]) -> bool:
    """Whether an export has exactly the tensors of ``saved``, and unpatched transformers computes the same from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = export(model, Path(folder) / "exported")
        written = _tensors(path)
        other = type(model).from_pretrained(path, dtype=torch.float32, **exact_attention(model.config)).eval()
    unpatch(model)
    with torch.no_grad():
        mine, theirs = (one(**inputs, use_cache=False).logits for one in (model, other))
    whole = set(written) == set(saved) and all(torch.equal(written[name], tensor) for name, tensor in saved.items())
    return whole and relative(theirs, mine) < 1e-5
