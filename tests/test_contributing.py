"""The examples of CONTRIBUTING.md register themselves and work, in a separate process with its own registries."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE = """
import json, sys
from pathlib import Path
import torch
from toolkit.config import validate
from toolkit.exporting import export
from toolkit.testing.models import random_model
from toolkit.training.loop import train

folder = Path(sys.argv[1])
config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
result = train(validate({
    "output_dir": str(folder),
    "objective": {"kind": "slic", "task": {"name": "reverse", "length": 3}, "pairs": 4, "beta": 0.5,
                  "rollout": {"max_completion_length": 8}, "evaluation": {"max_eval_samples": 8}},
    "model": {"config": config},
    "tokenizer": {"vocab_size": 257},
    "train": {"max_steps": 1, "batch_tokens": 128, "max_length": 32},
    "log": {"report_to": "none", "plot": False},
}), quiet=True)
assert abs(result["loss"] - 1.0) < 1e-6, result  # no margin yet
export(random_model("llama"), folder / "out", "weights")
assert (folder / "out" / "weights.safetensors").is_file()
"""


def test_the_examples_work_as_written(tmp_path):
    blocks = re.findall(
        r"```python\n(# toolkit/(?:training|exporting)/.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    assert len(blocks) == 3
    (tmp_path / "run.py").write_text("\n".join([*blocks, USE]))
    result = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
