"""A row of a causal language model."""

import copy
import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.exporting import export
from toolkit.patching import patch, token_logprobs, unpatch
from toolkit.testing.architectures import small_model
from toolkit.testing.coverage.far import far_error, far_logits
from toolkit.testing.coverage.measuring import (
    NEW_TOKENS,
    greedy,
    greedy_by_forwards,
    loss_and_gradient,
    next_logprobs,
    relative,
    same_greedy,
    text,
)
from toolkit.testing.coverage.row import Column, Row
from toolkit.testing.models import exact_attention
from toolkit.testing.parity import check_parity

PARITY_TOKENS = 150
SHORT, LONG = 5, 40
"""Tokens of a sequence and of its neighbour."""
COLUMNS = (
    Column("loss", "relative difference from the unpatched model's loss", 1e-5),
    Column("gradient", "the same of all gradients together, by norm", 1e-4),
    Column("beyond", "the same of logits across every length in the configuration: original positions, windows", 1e-4),
    Column(
        "beside",
        f"largest difference of a log-probability of {SHORT} tokens beside {LONG} others from the unpatched model's of "
        "them alone, nats",
        1e-4,
    ),
    Column(
        "16-bit",
        "median error of a bfloat16 model's logits as a multiple of the unpatched one's; both against the same weights "
        "in float32",
        1.5,
    ),
    Column(
        "greedy",
        f"the engine's {NEW_TOKENS} greedy tokens for two prompts are those of the unpatched `generate`; of the "
        "unpatched forward where positions do not begin at 0, which `generate` counts otherwise",
    ),
    Column(
        "differing",
        f"tokens, of {PARITY_TOKENS} or more, whose log-probability differs in a bit between engine and training",
        0,
    ),
    Column("export", "unpatched transformers opens an export and computes the same logits"),
)


def measure(model_type: str, **settings: Any) -> Row:
    """One architecture's row, with further settings of its configuration; an exception is the row's reason."""
    row, begun = Row(model_type, COLUMNS), time.monotonic()
    stage = "no small model can be built"
    try:
        model = small_model(model_type, **settings)
        row.name = type(model).__name__
        stage = "the small model's unpatched forward fails"
        ids = text()
        loss, gradient = loss_and_gradient(model, {"input_ids": ids}, ids)
        if not math.isfinite(float(loss)):
            raise ToolkitError("the loss is not finite")
        far = far_logits(model)
        prompts = [ids[0, :length].tolist() for length in (SHORT, 11)]
        alone = next_logprobs(model, {"input_ids": ids[:1, :SHORT]})
        narrow, upcast = _in_16_bits(model)
        stage = "patch"
        report = patch(model)
        row.roles = report.roles()
        row.probe_error = report.worst_error()
        row.skipped = [f"{role} {path}: {reason}" for role, path, _, reason in report.skipped_rows()]
        stage = "patched forward"
        got, patched = loss_and_gradient(model, {"input_ids": ids}, ids)
        row.values["loss"] = relative(got, loss)
        row.values["gradient"] = relative(patched, gradient)
        row.values["beyond"] = far_error(model, far)
        stage = "ragged batch"
        with torch.no_grad():
            beside = token_logprobs(model, [ids[0, :SHORT].tolist(), text(LONG, 1)[0].tolist()])
        row.values["beside"] = float((beside[0].cpu() - alone).abs().max())
        stage = "16-bit"
        row.values["16-bit"] = _rounding(narrow, upcast)
        stage = "transformers' generate"
        unpatch(model)
        if report.ragged.position_offset:
            expected = [greedy_by_forwards(model, prompt) for prompt in prompts]
        else:
            expected = [greedy(model, {"input_ids": torch.tensor([prompt])}) for prompt in prompts]
        patch(model)
        stage = "engine"
        row.values["greedy"] = same_greedy(model, prompts, expected)
        stage = "parity"
        row.values["differing"] = check_parity(model, [ids[0].tolist()], min_tokens=PARITY_TOKENS).differing
        stage = "export"
        row.values["export"] = _reloads(model)
    except Exception as problem:
        row.failed(stage, problem)
    finally:
        row.seconds = round(time.monotonic() - begun, 1)
    return row


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def _in_16_bits(model: Any) -> tuple[Any, Any]:
    """The model in bfloat16, and the same weights in float32.

    What transformers keeps in float32 when it loads a checkpoint in bfloat16 stays so: a model's code may rely on it.
    """
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    names = re.compile("|".join(rf"(^|\.){re.escape(one)}($|\.)" for one in sorted(kept)) or "$^")
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    for name, parameter in (*narrow.named_parameters(), *narrow.named_buffers()):
        if parameter.is_floating_point() and names.search(name):
            parameter.data = parameter.data.float()
    return narrow, copy.deepcopy(narrow).float()


def _rounding(narrow: Any, upcast: Any) -> float:
    """The error of a token's patched bfloat16 logits as a multiple of that of unpatched ones, medians of both.

    Medians, because rounding sends some tokens of MoE models to other experts, in either model.
    """
    ids = text(24, 4)
    exact, stock = _logits(upcast, ids), _logits(narrow, ids)
    patch(narrow)
    patched = _logits(narrow, ids)
    errors = [(found - exact).norm(dim=-1).median() for found in (patched, stock)]
    return float(errors[0] / errors[1].clamp_min(1e-30))


def _reloads(model: Any) -> bool:
    """Whether an export, loaded by unpatched transformers, computes the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        path = export(model, Path(folder) / "exported")
        other = type(model).from_pretrained(path, dtype=torch.float32, **exact_attention(model.config)).eval()
    unpatch(model)
    return torch.allclose(_logits(model, text()), _logits(other, text()), rtol=1e-5, atol=1e-6)
