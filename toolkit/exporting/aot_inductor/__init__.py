"""An AOTInductor package of the patched model's step, with the ops' library and a loop that needs torch alone."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from toolkit.errors import ToolkitError, first_line
from toolkit.exporting.aot_inductor.step import BLOCK_SIZE, Step, example
from toolkit.exporting.base import ConsumerOutput, ExportJob, ExportTarget
from toolkit.exporting.hf import check_causal, check_whole_model, eos_token_ids, write_checkpoint
from toolkit.exporting.programs import quiet_torch_export
from toolkit.loading import load_model
from toolkit.ops import native
from toolkit.patching import patch
from toolkit.patching.state_spec import state_spec

LOOP = "generate.py"
ABOUT = "program.json"
_RECORDED = ("routing", "selection")
"""State kinds that an engine keeps where it is asked to; a step needs none of them."""


class AotInductor(ExportTarget, name="aot-inductor"):
    """``step.pt2``: one step over paged state, of any number of sequences and new tokens. A prefill is a step, too.

    ``ops.so`` has the ops' kernels, ``program.json`` their schemas and the step's inputs, ``generate.py`` a loop. The
    package runs on processors with the instructions of the one that it was made on, and with this torch.
    """

    def check(self, job: ExportJob) -> None:
        check_whole_model(job, self.target)
        check_causal(job, self.target)
        if native.load() is None:
            raise ToolkitError(
                f"An export to {self.target!r} needs the native CPU library, which this installation does not have: "
                "install the package where there is a C++ compiler, and leave TOOLKIT_NATIVE unset."
            )
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            raise ToolkitError(f"An export to {self.target!r} needs a C++ compiler: install g++ or clang++.")

    def write(self, job: ExportJob, folder: Path) -> None:
        with TemporaryDirectory(prefix=".checkpoint.", dir=folder) as checkpoint:
            write_checkpoint(ExportJob(job.model), Path(checkpoint))
            dtype = str(job.model.dtype).removeprefix("torch.")
            model, _ = load_model(checkpoint, dtype)
            about = write_package(model, folder, self.target)
        about["eos_token_ids"] = eos_token_ids(job.model, job.tokenizer)
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(folder)

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput:
        command = [sys.executable, str(folder / LOOP), json.dumps([list(prompt) for prompt in prompts])]
        done = subprocess.run([*command, "--max-tokens", str(max_tokens)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
        return ConsumerOutput(f"AOTInductor of torch {torch.__version__}", json.loads(done.stdout))


def write_package(model: Any, folder: Path, target: str) -> dict[str, Any]:
    """Patch ``model``, and write its step, the ops' library and the loop into ``folder``; what the loop needs to know.

    Raises:
        ToolkitError: torch.export or AOTInductor does not take it.
    """
    name = type(model).__name__
    patch(model)
    step = step_of(model)
    arguments, shapes = example(step.inputs)
    try:
        with torch.no_grad(), quiet_torch_export(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(step, tuple(arguments), dynamic_shapes=(tuple(shapes),), strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(folder / "step.pt2"), inductor_configs={"cpp.dynamic_threads": True}
            )
    except OSError:  # a full disk, say
        raise
    except Exception as error:  # tracers and compilers raise errors of every kind
        reason = first_line(error, with_class=True)
        raise ToolkitError(f"An export to {target!r} cannot hold a {name} ({reason}).") from None
    library = native.path()
    assert library is not None
    shutil.copyfile(library, folder / "ops.so")
    shutil.copyfile(Path(__file__).with_name(LOOP), folder / LOOP)
    called = {node.target for node in program.graph.nodes if _is_op(node.target)}
    return description(step) | {"ops": sorted(str(op._schema).removeprefix("toolkit::") for op in called)}


def description(step: Step) -> dict[str, Any]:
    """What the loop needs to know of a step."""
    return {
        "inputs": [
            {"name": one.name, "sizes": list(one.sizes), "dtype": str(one.dtype).removeprefix("torch.")}
            for one in step.inputs
        ],
        "block_size": BLOCK_SIZE,
        "snapshot_groups": [at for at, group in enumerate(step.pool.groups) if group.snapshot_interval],
        "instruction_set": native.load(),
    }


def step_of(model: Any) -> Step:
    """The step of a patched model."""
    return Step(model, [spec for spec in state_spec(model) if spec.kind not in _RECORDED], model.dtype)


def _is_op(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "toolkit"
