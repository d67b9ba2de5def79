"""Environments of clients that do not fit beside this one's packages; their scripts reach this machine only."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
SCRIPTS = Path(__file__).with_name("clients")
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost", "OPENAI_API_KEY": "-", "ANTHROPIC_API_KEY": "-", "OMP_NUM_THREADS": "1",
}  # fmt: skip
"""Of a client's process: nothing but this machine answers."""
KEPT = "TOOLKIT_CLIENT_ENVIRONMENTS"
"""A variable that names a folder where environments are kept, by name, for the next run."""


def client_environment(
    folder: Path, name: str, packages: Sequence[str], pins: Sequence[str] = (), beside: bool = False
) -> str:
    """The Python of a virtual environment with packages of the package index.

    Args:
        folder: where it is made, unless ``KEPT`` names one.
        name: of the environment.
        packages: to install.
        pins: versions of what they need; ``beside`` those of this project where there are none.
        beside: whether this environment's packages are importable there too, which are not installed again then.
    """
    folder = Path(os.environ.get(KEPT, folder)) / name
    python = str(folder / "bin" / "python")
    if Path(python).exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = CONSTRAINTS
    if pins or not beside:
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{one}\n" for one in pins))
    if beside:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        there = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        Path(there, "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "-q", "-c", str(constraints), *packages]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return python


def run_client(command: Sequence[str], folder: Path, **variables: str) -> str:
    """What a client's command prints; it runs in ``folder``, which is its home too."""
    home = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "XDG_DATA_HOME": str(folder), "TMPDIR": str(folder)}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(command), cwd=folder, env=kept | OFFLINE | home | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_script(python: str, name: str, folder: Path, *arguments: str, **variables: str) -> Any:
    """The JSON that a script of ``clients`` prints as its last line."""
    out = run_client([python, str(SCRIPTS / name), *arguments], folder, **variables)
    return json.loads(out.strip().splitlines()[-1])
