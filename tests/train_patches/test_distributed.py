"""Patched models under DDP, FSDP2 and ZeRO-1, 2, 3: the launch lines of recipes/distributed, two processes each."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from toolkit.config.load import shipped

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPES = ROOT / "recipes" / "distributed"
CPU, GPUS, NODES = re.findall(r"```bash\n(.*?)```", (RECIPES / "README.md").read_text(), re.S)


def line_of(file: str) -> str:
    """The launch line for CPUs that names ``file``."""
    (line,) = [line for line in CPU.splitlines() if file in line]
    return line


def run(line: str, script: str, folder: Path, *cases: str) -> None:
    """A launch line with a script of this folder in the place of the user's; both processes must say that all held."""
    words = [*line.replace("train.py", f"{HERE / script} {folder}").split(), *cases]
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    program, *arguments = words[len(settings) :]
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    option = {"accelerate": ["launch", "--main_process_port", port], "deepspeed": ["--master_port", port]}[program]
    arguments = option + arguments[program == "accelerate" :]
    result = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        cwd=ROOT,
        env=os.environ | settings | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("all held") == 2


def test_fsdp2_in_short(tmp_path: Path) -> None:
    """Training and rollouts of one model as accelerate shards it."""
    run(line_of("fsdp2.yaml"), "under_accelerate.py", tmp_path, "few")


@pytest.mark.sweep
@pytest.mark.parametrize("file", ["ddp.yaml", "fsdp2.yaml"])
def test_accelerate(file: str, tmp_path: Path) -> None:
    run(line_of(file), "under_accelerate.py", tmp_path, "all")


@pytest.mark.sweep  # test_expert_frameworks.py has DeepSpeed's stage 2
def test_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run(line_of("zero3.json"), "under_deepspeed.py", tmp_path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_accepts(path: Path) -> None:
    config = load_config_from_file(str(path))
    kind = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
    assert config.distributed_type == kind[path.stem.removesuffix("_nodes")]
    assert config.num_machines == (2 if path.stem.endswith("_nodes") else 1)
    for file in ("deepspeed_config_file", "deepspeed_hostfile"):
        assert (ROOT / config.deepspeed_config.get(file, RECIPES)).exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_accepts(stage: int) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(json.loads((RECIPES / f"zero{stage}.json").read_text()))
    assert config.zero_optimization_stage == stage
    assert config.zero_config.offload_optimizer.device == "cpu"


def test_every_file_is_in_a_launch_line_and_none_is_a_recipe() -> None:
    lines = CPU + GPUS + NODES
    files = {path.name for path in RECIPES.iterdir()} - {"README.md"}
    assert set(re.findall(r"recipes/distributed/(\S+)", lines)) == files - {"zero1.json", "zero2.json"}
    assert not {path.stem for path in RECIPES.glob("*.yaml")} & set(shipped())
