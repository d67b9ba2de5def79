"""transformers and vLLM compute what folders of compressed-tensors stand for."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.exported_models import exported_model
from tests.helpers.vllm_server import opened, vllm_environment
from toolkit.exporting import export
from toolkit.loading import load_model
from toolkit.quantised import dequantise

BOUNDS = {"w8a16": 1e-3, "w4a16": 1e-3, "fp8": 0.3}
"""Of the difference of a log-probability from the same weights in float32. Where vLLM rounds inputs to FP8, a value
between two codes takes the other one."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vllm_environment(tmp_path_factory.mktemp("environment"))


def exported(form: str, tmp_path: Path) -> tuple[Path, Any, list[list[int]]]:
    """(folder, the model with the weights that it stands for, and inputs rounded as it says; sequences)."""
    model, tokenizer = exported_model("llama")
    chance = random.Random(0)
    sequences = [[chance.randrange(len(tokenizer)) for _ in range(60)] for _ in range(3)]
    folder = export(model, tmp_path / form, "compressed-tensors", tokenizer, form)
    rounded = load_model(str(folder))[0]
    dequantise(rounded)
    if form == "fp8":
        round_inputs(rounded)
    return folder, rounded, sequences


def rounded_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Inputs of a layer as a folder of fp8 has them rounded: one scale for each token."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


def round_inputs(model: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda module, inputs: (rounded_to_fp8(inputs[0]),))


@pytest.mark.parametrize("form", BOUNDS)
def test_transformers_has_its_log_probabilities(form, tmp_path):
    folder, rounded, sequences = exported(form, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for sequence in sequences:
        with torch.no_grad():
            theirs, ours = (model(torch.tensor([sequence])).logits.log_softmax(-1) for model in (stock, rounded))
        assert (theirs - ours).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["w4a16", "fp8"])  # on a CPU vLLM has no kernel for w8a16
def test_vllm_has_its_log_probabilities(form, python, tmp_path):
    folder, rounded, sequences = exported(form, tmp_path)
    found = opened(python, folder, rounded, sequences, 1e-3)
    print(form, found)
    assert found.largest < BOUNDS[form]
    assert found.decided > 100
    assert found.other_argmax <= (2 if form == "fp8" else 0)
