"""MLX and mistral.rs, in separate environments, open exported folders and say what transformers says."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.client_environments import client_environment, run_script
from tests.helpers.exported_models import exported_model
from tests.helpers.smollm2 import TEXT, load_smollm2
from toolkit.exporting import export

FAMILIES = ("llama", "qwen3", "gemma3_text", "qwen3_moe", "lfm2")
BOUND = 1e-3
"""Of the difference of a log-probability of float32 weights."""
NEW_TOKENS = 32
PROMPTS = ["the page ", "a grammar of the engine", "In 1889"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def mlx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return client_environment(tmp_path_factory.mktemp("environment"), "mlx", ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"])


@pytest.fixture(scope="module")
def mistralrs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return client_environment(tmp_path_factory.mktemp("environment"), "mistralrs", ["mistralrs==0.9.5"])


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """What stock transformers generates."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return out[0, len(prompt) :].tolist()


def agree(model: Any, tokenizer: Any, python: str, folder: Path, sequences: list[list[int]], tmp_path: Path) -> None:
    """MLX has the model's log-probabilities and its greedy tokens."""
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    asked, out = tmp_path / "asked.json", tmp_path / "out.npz"
    asked.write_text(json.dumps({"sequences": sequences, "prompts": prompts, "new_tokens": NEW_TOKENS}))
    generated = run_script(python, "mlx_log_probabilities.py", tmp_path, str(folder), str(asked), str(out))["generated"]
    theirs, largest = np.load(out), 0.0
    for at, sequence in enumerate(sequences):
        with torch.no_grad():
            ours = model(torch.tensor([sequence])).logits[0].double().log_softmax(-1)
        largest = max(largest, (torch.from_numpy(theirs[f"s{at}"]).double() - ours).abs().max().item())
    print(folder.name, largest)
    assert largest < BOUND
    assert generated == [greedy(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_has_the_log_probabilities_of_random_models(family, mlx, tmp_path):
    model, tokenizer = exported_model(family)
    chance = random.Random(0)
    sequences = [[chance.randrange(len(tokenizer)) for _ in range(length)] for length in (60, 33, 2)]
    agree(model, tokenizer, mlx, export(model, tmp_path / family, "hf", tokenizer), sequences, tmp_path)


def test_mlx_has_the_log_probabilities_of_smollm2(mlx, tmp_path):
    model, tokenizer = load_smollm2()
    sequences = [tokenizer(TEXT)["input_ids"]]
    agree(model, tokenizer, mlx, export(model, tmp_path / "smollm2", "hf", tokenizer), sequences, tmp_path)


def same_text(model: Any, tokenizer: Any, python: str, folder: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"prompts": PROMPTS, "new_tokens": NEW_TOKENS}))
    generated = run_script(python, "mistralrs_greedy.py", tmp_path, str(folder), str(asked))["generated"]
    tokens = [greedy(model, tokenizer(text)["input_ids"]) for text in PROMPTS]
    expected = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    # Bytes that are no text are shown piece by piece there, and of a whole here.
    assert [text.replace("\ufffd", "") for text in generated] == [text.replace("\ufffd", "") for text in expected]


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in ("gemma3_text", "lfm2")])  # it has none
def test_mistral_rs_generates_the_text_of_random_models(family, mistralrs, tmp_path):
    model, tokenizer = exported_model(family)
    same_text(model, tokenizer, mistralrs, export(model, tmp_path / family, "hf", tokenizer), tmp_path)


def test_mistral_rs_generates_the_text_of_smollm2(mistralrs, tmp_path):
    model, tokenizer = load_smollm2()
    same_text(model, tokenizer, mistralrs, export(model, tmp_path / "smollm2", "hf", tokenizer), tmp_path)
