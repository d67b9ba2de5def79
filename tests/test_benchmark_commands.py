"""Every benchmark's command runs and passes its gate, at its smallest size. Nothing is timed here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "serve": "--batch 1 --prompt 8 --new-tokens 4 --repeats 1 --generate-batch 0",
    "train": "--rows 1 --length 16 --repeats 1",
    "moe": "--only memory training generation --rows 1 --length 16 --batch 1 --prompt 8 --new-tokens 4 --repeats 1",
    "grpo": "--prompt 16 --num-generations 4 --completion 4 --micro 4 --repeats 1",
    "trl_grpo": "--prompt 16 --num-generations 4 --completion 4 --layers 1 --repeats 1 --turns 1",
    "trainer_curve": "--steps 4",
    "distributed": "--steps 2",
    "long_sequence": "--length 96 --chunk 32 --compare 64",
    "moe_overlap": "--tokens 16 --hidden-size 32 --intermediate-size 16 --chunks 2 --repeats 1",
    "fuzz": "--requests 150",
    "http_overhead": "--streams 2 --prompt 8 --new-tokens 4 --repeats 1",
    "decode": "--models thin --batch 1 2 --repeats 1",
    "joined_weights": "--models thin --batch 1 2 --tokens 16 --repeats 1",
    "adapters": "--layers 1 --batch 4 --adapters 3 --repeats 1",
    "live": "--layers 1 --tokens 96 --streams 1 --seconds 0.5 --repeats 1 --threads 1",
    "structured": "--layers 1 --batch 2 --repeats 1",
    "speculation": "--tasks random rollout --batch 2 --new-tokens 8 --repeats 1",
    "narrow": "--layers 1 --new-tokens 2 --repeats 1",
    "sparse_attention": "--lengths 256 --heads 4 --index-heads 2 --topk 32 --repeats 1",
    "encoder_attention": "--tokens 16 --hidden-size 32 --intermediate-size 48 --heads 2 --repeats 1",
    "pooling": "--texts 5 --longest 24 --layers 1 --repeats 1",
    "patch_cost": "--only 0.6",
    "quantised": "--threads 1 --repeats 1 --rows 1 --largest 400000 --experts 4 2 64 32",
    "low_precision": "--model qwen3_moe --layers 1 --batch 1 --repeats 1 --sides float32@int8 int8 --dense-head",
    "qlora": "--layers 1 --length 16 --repeats 1 --curve-layers 1 --curve-steps 3 --curve-length 8",
    "sizing": "--layers 1 2 --overlap-layers 1 --completion 4 --samples 4 --steps 1 --rows 2 --longest 8 --repeats 1",
    "ops": "--only bits linear head --seconds 0.01",
    "ops.attention": "--repeats 1",
}

# More than 20 seconds on two cores, at the smallest size too.
LONG = {
    "ops", "fuzz", "narrow", "moe", "distributed", "grpo", "live", "sizing", "speculation", "train", "http_overhead",
    "qlora",
}  # fmt: skip


def run(module: str, arguments: str, folder: Path) -> str:
    """Standard output of a command, whose results go to ``folder`` and not over the committed ones."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = kept | {"TOOLKIT_BENCHMARK_RESULTS": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments.split()]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if name in LONG else []) for name in COMMANDS]
)
def test_a_benchmark_passes_its_gate(name: str, tmp_path: Path) -> None:
    committed = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert run(f"benchmarks.{name}", COMMANDS[name], tmp_path)
    assert committed == {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_a_kernel_compiles_for_each_target(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = run("tools.compile_kernels", "--only causal_conv_paged --processes 1", tmp_path)
    assert all(arch in out for arch in ("sm_80", "sm_90", "sm_100", "gfx942"))
    assert "unfit" not in out


def test_every_command_has_a_small_size() -> None:
    short = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    short -= {"__init__", "common"}
    short -= {"picture"}  # which measures nothing
    short -= {"peers", "llama_cpp", "perplexity"}  # which need a separate environment, or files of a model
    assert short <= set(COMMANDS)
