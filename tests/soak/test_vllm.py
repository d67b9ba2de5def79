"""vLLM on a CPU serves exported folders with the model's log-probabilities."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.exported_models import exported_model
from tests.helpers.smollm2 import TEXT, load_smollm2
from tests.helpers.vllm_server import Differences, differences, vllm_environment, vllm_serving
from toolkit.exporting import export

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "lfm2")
BOUND = 1e-3
"""Of the difference of a log-probability of float32 weights; tokens must agree beyond ten times that."""

OPTIONS = {"lfm2": ("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}')}
"""vLLM's LFM2 gives its CPU kernel of rotary embeddings queries with a dimension more than that reads."""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vllm_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_smollm2()


def seen(python: str, folder: Path, model: Any, sequences: list[list[int]], bound: float, *options: str) -> Differences:
    with vllm_serving(python, folder, "float32", *options) as url:
        found = differences(url, model, sequences, bound)
    print(folder.name, found)
    assert found.decided > 0
    assert found.other_argmax == 0
    assert found.largest < bound
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models(family, python, tmp_path):
    model, tokenizer = exported_model(family)
    chance = random.Random(0)
    sequences = [[chance.randrange(len(tokenizer)) for _ in range(60)] for _ in range(3)]
    folder = export(model, tmp_path / family, "hf", tokenizer)
    seen(python, folder, model, sequences, BOUND, *OPTIONS.get(family, ()))


def test_smollm2(smollm2, python, tmp_path):
    model, tokenizer = smollm2
    folder = export(model, tmp_path / "smollm2", "hf", tokenizer)
    seen(python, folder, model, [tokenizer(TEXT)["input_ids"]], BOUND)
