"""Triton Inference Server on a model repository, for as long as a block runs."""

import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from toolkit.errors import ToolkitError

PROGRAM = "tritonserver"
SECONDS = 300.0
"""Most that a server has to load its models, and to answer."""


class TritonServer:
    """The ``tritonserver`` of the path, serving HTTP on a free port of this machine.

    Args:
        repository: folder with a folder for each model.

    Raises:
        ToolkitError: it ends before it is ready, or is not ready in time.
    """

    def __init__(self, repository: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        options = [f"--http-port={port}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false"]
        # How long Triton waits for the Python of a model before it starts another; 30 otherwise.
        options.append(f"--backend-config=python,stub-timeout-seconds={SECONDS:.0f}")
        command = [PROGRAM, f"--model-repository={repository}", *options]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def installed() -> bool:
        return shutil.which(PROGRAM) is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let it end, and end it where it does not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def version(self) -> str:
        """Of the server."""
        with self._open("/v2") as response:
            return str(json.load(response)["version"])

    def generate(self, model: str, **request: Any) -> dict[str, Any]:
        """What ``/generate`` answers to a request.

        Raises:
            ToolkitError: an error; its message.
        """
        with self._open(f"/v2/models/{model}/generate", request) as response:
            found: dict[str, Any] = json.load(response)
        return found

    def generate_stream(self, model: str, **request: Any) -> Iterator[dict[str, Any]]:
        """The events of ``/generate_stream``."""
        with self._open(f"/v2/models/{model}/generate_stream", request) as response:
            for line in response:
                if line.startswith(b"data:"):
                    yield json.loads(line.removeprefix(b"data:"))

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"content-type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            raise ToolkitError(json.load(error).get("error", str(error))) from None

    def _wait(self) -> None:
        deadline = time.monotonic() + SECONDS
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ToolkitError(f"{PROGRAM} must serve the export, got: {self._last_words()}")
            try:
                with urllib.request.urlopen(f"{self.address}/v2/health/ready", timeout=5):
                    return
            except OSError:  # not listening, or not ready
                time.sleep(0.2)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or ["nothing"])[-1]
