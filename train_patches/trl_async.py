"""TRL's AsyncGRPOTrainer with ``toolkit serve`` in the place of vLLM: weights travel in a folder.

    transfer = FolderWeightTransfer("http://127.0.0.1:8000", "/shared/policy")
    trainer = AsyncGRPOTrainer(..., weight_transfer=transfer)

Start the server with ``--enable-admin-endpoints``: TRL's client sends no keys.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from trl.experimental.async_grpo.vllm_client import VLLMClient


class FolderWeightTransfer:
    """What AsyncGRPOTrainer takes as ``weight_transfer``: each update is a folder that the server reads.

    A folder is written aside and renamed, so the server never reads half of one; the one before is removed once the
    server has read the new one. All parameters of the model must be trained: TRL sends no others, and a folder without
    them is refused.

    Args:
        server: its address, or TRL's client of it.
        folder: where the folders are made, which the server sees under the same path.
        numerics_fingerprint: the trainer's (``toolkit.engine.fingerprint``); a server in bitwise mode whose own differs
            refuses it. None sends none.
        weight_sync_timeout: seconds for the server to read one.
    """

    def __init__(
        self, server: "str | VLLMClient", folder: str | Path, *,
        numerics_fingerprint: Mapping[str, str] | None = None, weight_sync_timeout: int = 1800,
    ) -> None:  # fmt: skip
        if isinstance(server, str):
            from trl.experimental.async_grpo.vllm_client import VLLMClient

            server = VLLMClient(server)
        self.client, self.folder = server, Path(folder).absolute()
        self._fingerprint, self._timeout = numerics_fingerprint, weight_sync_timeout
        self._number = 0

    def init_weight_transfer(self) -> None:
        """Wait for the server, and ask it whether it takes updates of this trainer."""
        self.client.wait_for_server_ready()
        info: dict[str, Any] = {"backend": "folder"}
        if self._fingerprint is not None:
            info["numerics_fingerprint"] = dict(self._fingerprint)
        self.client.init_weight_transfer_engine(info)

    def pause(self) -> None:
        """Freeze what the server generates."""
        self.client.pause()

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Write the tensors to a new folder, and let the server read it."""
        from huggingface_hub import save_torch_state_dict

        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in iterator}
        if not weights:
            raise ToolkitError("send_weights must be given >= 1 tensors, got none.")
        self._number += 1
        final = self.folder / f"update-{self._number}"
        aside = self.folder / f".update-{self._number}"
        for old in (aside, final):
            shutil.rmtree(old, ignore_errors=True)
        aside.mkdir(parents=True)
        save_torch_state_dict(weights, aside)
        aside.rename(final)
        self.client.start_weight_update()
        self.client.update_weights({"weight_dir": str(final)}, timeout=self._timeout)
        self.client.finish_weight_update()
        shutil.rmtree(self.folder / f"update-{self._number - 1}", ignore_errors=True)

    def resume(self) -> None:
        """Let the server continue."""
        self.client.resume()

    def destroy(self) -> None:
        """Remove what is left of the folders."""
        shutil.rmtree(self.folder / f"update-{self._number}", ignore_errors=True)
