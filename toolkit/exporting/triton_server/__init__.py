"""A model repository of Triton Inference Server, whose Python backend runs the engine."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from toolkit.exporting.base import ConsumerOutput, ExportJob, ExportTarget
from toolkit.exporting.hf import check_causal, check_whole_model, write_checkpoint
from toolkit.exporting.triton_server.consumer import TritonServer

MODEL = "model"
"""Triton's name of the model: that of its folder, which may be renamed."""
CONFIG = """# Parameters of a request are the engine's sampling parameters: max_tokens, temperature, stop, ...
backend: "python"
max_batch_size: 0  # the engine batches, step by step
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] optional: true }},
  {{ name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] optional: true }},
  {{ name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }},
  {{ name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "text_output" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "token_ids" data_type: TYPE_INT64 dims: [ -1 ] }},
  {{ name: "logprobs" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
parameters: {{ key: "dtype" value: {{ string_value: "{dtype}" }} }}
# Options of the engine as JSON: max_num_seqs, max_model_len, ...
parameters: {{ key: "engine" value: {{ string_value: {engine} }} }}
"""


class TritonRepository(ExportTarget, name="triton-server"):
    """``model/config.pbtxt``, ``model/1/model.py`` and the checkpoint that it serves, decoupled: responses stream.

    The Python of Triton's backend needs this package.
    """

    def check(self, job: ExportJob) -> None:
        check_whole_model(job, self.target)
        check_causal(job, self.target)

    def write(self, job: ExportJob, folder: Path) -> None:
        version = folder / MODEL / "1"
        (version / "checkpoint").mkdir(parents=True)
        write_checkpoint(job, version / "checkpoint")
        shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
        dtype = str(job.model.dtype).removeprefix("torch.")
        (folder / MODEL / "config.pbtxt").write_text(CONFIG.format(dtype=dtype, engine=json.dumps("{}")))

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput | None:
        if not TritonServer.installed():
            return None
        with TritonServer(folder) as server:
            asked = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
            responses = [server.generate(MODEL, input_ids=list(prompt), parameters=asked) for prompt in prompts]
            version = server.version()
        return ConsumerOutput(f"tritonserver {version}", [_ids(response["token_ids"]) for response in responses])


def _ids(given: int | list[int]) -> list[int]:
    """Triton's JSON has a tensor of one element as a number."""
    return given if isinstance(given, list) else [given]
