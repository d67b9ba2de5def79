"""The wheel and the sdist that a checkout builds, in new environments without a compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys, torch, toolkit
from pathlib import Path
from toolkit.ops import native
from toolkit.testing.models import random_model

assert Path(toolkit.__file__).is_relative_to(sys.prefix), toolkit.__file__
print("kernels", native.load())
model = random_model("llama")
toolkit.patch(model)
with toolkit.Engine(model) as engine:
    output = engine.generate([[1, 5, 9]], toolkit.SamplingParams(max_tokens=8, seed=0))[0]
again = toolkit.token_logprobs(model, [[1, 5, 9, *output.token_ids]])[0][2:]
assert torch.equal(torch.tensor(output.logprobs), again.detach())
print("all held")
"""


DROPPED = ("PYTHONPATH", "CXX", "CC", "TOOLKIT_NATIVE")
"""Variables through which another copy of the package, or a compiler, would be found."""


def run(*command: str, folder: Path = ROOT, path: str | None = None) -> str:
    """Standard output of a command that must end with status 0; ``path`` stands for PATH."""
    environment = {name: value for name, value in os.environ.items() if name not in DROPPED} | {"OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PATH"] = path
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy of what git tracks and of the libraries that are compiled already."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    tracked = run("git", "ls-files", "-z").split("\0")
    libraries = [str(path.relative_to(ROOT)) for path in (ROOT / "toolkit" / "ops" / "native").glob("*.so")]
    for name in (*filter(None, tracked), *libraries):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy)]
    run(*build)
    (path,) = folder.glob("*.whl")
    return path


def use(python: Path, folder: Path) -> str:
    """What a small program prints where PATH holds no compiler."""
    out = run(str(python), "-c", PROGRAM, folder=folder, path=str(folder))
    assert "all held" in out
    assert "kernels None" not in out
    return out


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_a_wheel_runs_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"toolkit/ops/native/baseline.so", "toolkit/serving/page/files/app.js"} <= set(names)
    assert not any(name.split("/")[0] in ("tests", "benchmarks", "tools") for name in names)
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"))
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (folder,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (folder / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    use(python, tmp_path)
    command = tmp_path / "env" / "bin" / "toolkit"
    verify = [str(command), "verify", "--random", "llama", "--tokens", "50", "--no-overhead"]
    assert "sampled tokens, 0 whose log-probability" in run(*verify, folder=tmp_path, path=str(tmp_path))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_a_wheel_installs_with_its_dependencies(wheel: Path, tmp_path: Path, version: str) -> None:
    """Downloads everything. TOOLKIT_PYTHON_3_12=/some/python names an interpreter that is not on PATH."""
    python = os.environ.get(f"TOOLKIT_PYTHON_{version.replace('.', '_')}") or shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode != 0:
        pytest.skip(f"there is no Python {version} here")
    # Which Triton a torch wheel wants depends on the wheel.
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("triton==")]
    (tmp_path / "constraints.txt").write_text("\n".join(pinned))
    run(python, "-m", "venv", str(tmp_path / "env"))
    installed = tmp_path / "env" / "bin" / "python"
    run(str(installed), "-m", "pip", "install", "-c", str(tmp_path / "constraints.txt"), str(wheel))
    use(installed, tmp_path)


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_an_sdist_holds_the_sources_of_the_kernels(tmp_path: Path) -> None:
    code = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", code, str(tmp_path))
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", "toolkit", "train_patches", "infer_patches", "recipes").split())
    assert tracked <= names
    assert {"setup.py", "constraints.txt", "Makefile"} <= names
    assert not any(name.endswith(".so") for name in names)
