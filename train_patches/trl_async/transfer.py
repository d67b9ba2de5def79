"""Weights for a server that runs: each update is a folder that the server reads."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import requests
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.loading.weight_folders import WeightFolders
from train_patches.trl_clients import error_of

if TYPE_CHECKING:
    from trl.experimental.async_grpo.vllm_client import VLLMClient

RESUME = "start the server, and resume with trainer.train(resume_from_checkpoint=True)"
_PROBE_SECONDS = 5


class ServedWeights(NamedTuple):
    """Which weights a server has.

    Attributes:
        created: when its process began to serve, in seconds.
        version: of its weights, see ``/v1/models``.
    """

    created: int
    version: int


class FolderWeightTransfer:
    """What AsyncGRPOTrainer takes as ``weight_transfer``: each update is a folder that the server reads.

    The server never reads half of a folder (``WeightFolders``); the one before is removed once it has read the new one.
    All parameters of the model must be trained: TRL sends no others, and a folder without them is refused. What a
    trainer that was killed left in the folder is removed by the next.

    Args:
        server: its address, or TRL's client of it.
        folder: where the folders are made, which the server sees under the same path.
        numerics_fingerprint: the trainer's (``toolkit.engine.fingerprint``); a server in bitwise mode whose own differs
            refuses it. None sends none.
        weight_sync_timeout: seconds for the server to read one.
        server_timeout: seconds without an answer after which ``check`` gives the server up.

    Attributes:
        on_sent: called with the server's weight version after each update.
        served: the server's weights after the last update; None before the first.
    """

    def __init__(
        self, server: "str | VLLMClient", folder: str | Path, *,
        numerics_fingerprint: Mapping[str, str] | None = None, weight_sync_timeout: int = 1800,
        server_timeout: float = 60.0,
    ) -> None:  # fmt: skip
        if isinstance(server, str):
            from trl.experimental.async_grpo.vllm_client import VLLMClient

            server = VLLMClient(server)
        self.client, self._folders = server, WeightFolders(folder)
        self.served: ServedWeights | None = None
        self.numerics_fingerprint = numerics_fingerprint
        self.on_sent: Callable[[int], None] | None = None
        self._timeout, self._server_timeout = weight_sync_timeout, server_timeout

    def init_weight_transfer(self) -> None:
        """Wait for the server, and ask it whether it takes updates of this trainer.

        Raises:
            ToolkitError: it does not answer in time, or refuses.
        """
        self._ask(self.client.wait_for_server_ready)
        info: dict[str, Any] = {"backend": "folder"}
        if self.numerics_fingerprint is not None:
            info["numerics_fingerprint"] = dict(self.numerics_fingerprint)
        self._ask(self.client.init_weight_transfer_engine, info)
        self._folders.remove_left()

    def pause(self) -> None:
        """Freeze what the server generates. Raises ToolkitError for a server without the weights of the last update."""
        self.check()
        self._ask(self.client.pause)

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Write the tensors to a new folder, and let the server read it."""
        final = self._folders.write(dict(iterator))
        self._ask(self.client.start_weight_update)
        self._ask(self.client.update_weights, {"weight_dir": str(final)}, timeout=self._timeout)
        self._ask(self.client.finish_weight_update)
        self.served = self._ask(self._now)
        self._folders.remove_previous()
        if self.on_sent is not None:
            self.on_sent(self.served.version)

    def resume(self) -> None:
        """Let the server continue."""
        self._ask(self.client.resume)

    def destroy(self) -> None:
        """Remove what is left of the folders."""
        self._folders.remove_last()

    def check(self) -> None:
        """Raise ToolkitError where the server has not answered for ``server_timeout``, or has got other weights since.

        A server that was started again has the weights that it was started with.
        """
        if self.served is None:
            return
        end = time.monotonic() + self._server_timeout
        while True:
            try:
                now = self._now()
                break
            except requests.RequestException as error:
                if time.monotonic() >= end:
                    raise ToolkitError(self._silent(error)) from None
                time.sleep(0.2)
        if now != self.served:
            what = "was started again" if now.created != self.served.created else "got other weights"
            raise ToolkitError(
                f"The server at {self.client.server_url} {what} since the last update of this trainer: resume with "
                "trainer.train(resume_from_checkpoint=True)."
            )

    def _now(self) -> ServedWeights:
        response = requests.get(f"{self.client.server_url}/v1/models", timeout=_PROBE_SECONDS)
        response.raise_for_status()
        (card, *_) = response.json()["data"]
        return ServedWeights(card["created"], card["weight_version"])

    def _ask(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """What a call of TRL's client returns. Raises ToolkitError for what it raises."""
        try:
            return call(*arguments, **keywords)
        except (requests.RequestException, TimeoutError) as error:
            raise ToolkitError(self._silent(error)) from None
        except Exception as error:
            raise error_of(error, call.__name__) from None

    def _silent(self, error: Exception) -> str:
        return f"The server at {self.client.server_url} does not answer ({type(error).__name__}): {RESUME}."
