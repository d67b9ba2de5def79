"""The tritonserver that nvidia-pytriton bundles, with its Python backend and this checkout's packages."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from tests.helpers.client_environments import ROOT, client_environment

PACKAGES = ("nvidia-pytriton==0.7.0", "numpy<2")  # the backend's stub was built for numpy 1


def put_on_path(folder: Path, monkeypatch) -> None:
    """Make an environment with the server, and put a command ``tritonserver`` on the path."""
    python = client_environment(folder, "pytriton", PACKAGES)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    server = site / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / sysconfig.get_python_version() / "triton_python_backend_stub"
    shutil.copy(stub, server / "backends" / "python" / stub.name)
    libraries = [site / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    # The stub's interpreter ignores PYTHONPATH; it takes the environment of the python3 that it finds on the path.
    (site / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    command = folder / "bin" / "tritonserver"
    command.parent.mkdir(parents=True)
    command.write_text(
        "#!/bin/sh\n"
        f"export LD_LIBRARY_PATH={':'.join(map(str, libraries))}\n"
        f"export PATH={Path(python).parent}:$PATH\n"
        f'exec {server / "bin" / "tritonserver"} --backend-directory={server / "backends"} "$@"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
