"""A Hugging Face folder as vLLM serves it, run by vLLM in a separate environment."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.exporting.base import ConsumerOutput
from toolkit.exporting.hf import HuggingFace
from toolkit.loading import runner_of
from toolkit.loading.source import CONFIG, read_json

PYTHON = "TOOLKIT_VLLM_PYTHON"
"""A variable that names the Python of an environment with vLLM, whose dependencies exclude this one's."""
_PROGRAM = """
import json, sys
import vllm
asked = json.load(sys.stdin)
params = vllm.SamplingParams(temperature=0.0, max_tokens=asked["max_tokens"], ignore_eos=True, detokenize=False)
model = vllm.LLM(
    model=asked["folder"], dtype=asked["dtype"], max_model_len=asked["length"], max_num_seqs=8, enforce_eager=True,
    skip_tokenizer_init=True,
)
found = model.generate([{"prompt_token_ids": one} for one in asked["prompts"]], params)
outputs = [list(one.outputs[0].token_ids) for one in found]
print()
print(json.dumps({"version": vllm.__version__, "outputs": outputs}), flush=True)
"""


class Vllm(HuggingFace, name="vllm"):
    """The folder of target "hf"; the check runs the Python that ``TOOLKIT_VLLM_PYTHON`` names, or this one's vLLM.

    A model that generates nothing is not checked.
    """

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput | None:
        from transformers import AutoConfig

        if runner_of(AutoConfig.from_pretrained(folder, local_files_only=True), False) == "pooling":
            return None
        python = os.environ.get(PYTHON)
        if python is None:
            if importlib.util.find_spec("vllm") is None:
                return None
            python = sys.executable
        asked = {
            "folder": str(folder), "prompts": [list(one) for one in prompts], "max_tokens": max_tokens,
            "dtype": read_json(folder / CONFIG).get("dtype", "float32"),
            "length": max(map(len, prompts)) + max_tokens,
        }  # fmt: skip
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        try:
            done = subprocess.run(
                [python, "-c", _PROGRAM], input=json.dumps(asked), capture_output=True, text=True, env=variables
            )
        except OSError as error:
            raise ToolkitError(f"{PYTHON} must be a Python with vLLM, got {python!r}: {error.strerror}.") from None
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise ToolkitError(f"vLLM does not run the export ({last}).")
        found = json.loads(lines[-1])
        return ConsumerOutput(f"vllm {found['version']}", found["outputs"])
