"""Routers before replicas: nginx by the configuration of ``docs/router.md``, and vllm-router."""

import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.client_environments import KEPT, ROOT, client_environment

PAGE = ROOT / "docs" / "router.md"
_NGINX_FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def nginx_program(folder: Path) -> str:
    """The installed one, or that of Debian's package, unpacked."""
    found = shutil.which("nginx")
    if found is not None:
        return found
    folder = Path(os.environ.get(KEPT, folder)) / "nginx"
    program = folder / "usr" / "sbin" / "nginx"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "nginx"], cwd=folder, check=True, capture_output=True)
        (package,) = folder.glob("nginx_*.deb")
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    return str(program)


def nginx_configuration(listen: int, replicas: Sequence[str], folder: Path, affinity: bool) -> str:
    """The page's, with other ports; without ``affinity`` nginx takes the replicas in turn."""
    (text,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{listen}")
    for port, url in zip((8001, 8002), replicas, strict=True):
        assert text.count(f"127.0.0.1:{port}") == 1
        text = text.replace(f"127.0.0.1:{port}", url.removeprefix("http://"))
    if not affinity:
        text = text.replace("hash $affinity consistent;", "")
    paths = "".join(f"{name}_temp_path {folder / name};\n" for name in _NGINX_FOLDERS)
    return text.replace("http {\n", f"http {{\naccess_log off;\n{paths}", 1)


@contextmanager
def nginx(folder: Path, replicas: Sequence[str], affinity: bool = True) -> Iterator[str]:
    """Its address."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    (folder / "nginx.conf").write_text(nginx_configuration(port, replicas, folder, affinity))
    settings = f"daemon off; master_process off; pid {folder / 'nginx.pid'};"
    command = [nginx_program(folder), "-p", str(folder), "-c", "nginx.conf", "-e", "errors.log", "-g", settings]
    with _running(command, f"http://127.0.0.1:{port}", folder) as url:
        yield url


@contextmanager
def vllm_router(folder: Path, replicas: Sequence[str], affinity: bool = True) -> Iterator[str]:
    """Its address."""
    folder.mkdir(exist_ok=True)
    python = client_environment(folder, "vllm-router", ["vllm-router==0.1.17"])
    port, policy = free_port(), "cache_aware" if affinity else "round_robin"
    command = [
        str(Path(python).with_name("vllm-router")), "--port", str(port), "--prometheus-port", str(free_port()),
        "--policy", policy, "--worker-urls", *replicas,
    ]  # fmt: skip
    with _running(command, f"http://127.0.0.1:{port}", folder) as url:
        yield url


ROUTERS = {"nginx": nginx, "vllm-router": vllm_router}


@contextmanager
def _running(command: Sequence[str], url: str, folder: Path) -> Iterator[str]:
    """A router's process, once it lets a replica answer."""
    log = folder / "router.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 120
        while not _responds(url):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=20) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
