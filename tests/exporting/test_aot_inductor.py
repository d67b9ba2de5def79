"""The AOTInductor target: the step of tensors is the engine's forward, and the package needs torch alone."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.exported_models import exported_model
from tests.helpers.smollm2 import load_smollm2
from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, aot_inductor, export
from toolkit.exporting.aot_inductor import description, step_of
from toolkit.exporting.aot_inductor.generate import Program
from toolkit.ops import native
from toolkit.patching import patch
from toolkit.patching.forward import ragged_forward
from toolkit.state import RaggedBatch
from toolkit.testing.models import random_model

PROMPTS = [[5, 6, 7, 8], [200, 9, 13, 30, 41, 77, 8, 12, 99, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3]]
TOKENS = 6
BOUND = 1e-3
"""Of the difference of a log-probability of float32 weights."""


def engine_tokens(model: Any) -> list[list[int]]:
    with Engine(model) as engine:
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        return [list(one.token_ids) for one in engine.generate(PROMPTS, params)]


@pytest.mark.parametrize("family", ["qwen3", "lfm2", pytest.param("qwen3_next", marks=pytest.mark.sweep)])
def test_the_loop_over_the_step_gives_the_engines_tokens_and_log_probabilities(family, tmp_path, monkeypatch):
    model = random_model(family, hidden=32)
    patch(model)
    step = step_of(model)
    (tmp_path / "program.json").write_text(json.dumps(description(step) | {"ops": []}))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: step)
    with torch.no_grad():
        program = Program(tmp_path, len(PROMPTS), 32)
        outputs = program.generate(PROMPTS, TOKENS)
        logits = Program(tmp_path, len(PROMPTS), 32).logits(PROMPTS, [0] * len(PROMPTS))
        alone = Program(tmp_path, 1, 32).generate(PROMPTS[2:], TOKENS)
        whole = ragged_forward(model, RaggedBatch.from_sequences(PROMPTS, share=False))
    assert outputs == engine_tokens(model)
    assert alone == outputs[2:]
    assert torch.equal(logits, whole)


def test_without_the_native_library_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "load", lambda: None)
    with pytest.raises(ToolkitError, match="'aot-inductor' needs the native CPU library"):
        export(random_model("llama", hidden=16, layers=1), tmp_path / "out", "aot-inductor")
    assert not list(tmp_path.iterdir())


LOADED = """
import json, runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"toolkit", "transformers"} & set(sys.modules), "the model's code was imported"
program = runpy.run_path(sys.argv[0])["Program"](sequences=3, length=32)
prompts = json.loads(sys.argv[1])
torch.save(program.logits(prompts, [0] * len(prompts)), "logits.pt")
"""


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.skipif(native.load() is None, reason="needs the native CPU library")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "lfm2", "smollm2"])
def test_the_package_runs_in_a_process_without_the_models_code(family, tmp_path):
    model, _ = load_smollm2() if family == "smollm2" else exported_model(family)
    begun = time.monotonic()
    path = export(model, tmp_path / "out", "aot-inductor", prompts=PROMPTS, max_tokens=TOKENS)
    seconds = time.monotonic() - begun
    expected = engine_tokens(model)
    assert json.loads((path / MANIFEST).read_text())["proof"]["outputs"] == expected
    (tmp_path / "check.py").write_text(LOADED)
    command = [sys.executable, "check.py", str(path / aot_inductor.LOOP), json.dumps(PROMPTS), f"--max-tokens={TOKENS}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected
    with torch.no_grad():
        whole = ragged_forward(model, RaggedBatch.from_sequences(PROMPTS, share=False)).log_softmax(-1)
    largest = (torch.load(Path(tmp_path) / "logits.pt").log_softmax(-1) - whole).abs().max().item()
    print(family, f"largest difference {largest:.1e}, written and run in {seconds:.0f} s")
    assert largest < BOUND
