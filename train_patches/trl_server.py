"""TRL's trainers with ``vllm_mode="server"`` on ``toolkit serve``: GRPOTrainer and RLOOTrainer.

    with server_rollout():
        trainer = GRPOTrainer(
            model=model, args=GRPOConfig(use_vllm=True, vllm_mode="server", vllm_server_base_url=URL, ...), ...
        )
    trainer.train()

``toolkit serve MODEL --enable-admin-endpoints`` is the server: TRL's client sends no keys. All of TRL's client that
generates is its own; what it does through vLLM's package, weights over NCCL, goes over gloo here
(``toolkit.engine.weight_group``), so that neither vLLM's package nor a GPU is needed.
"""

import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from trl.generation import vllm_client, vllm_generation

from toolkit.engine.weight_group import WeightGroup
from toolkit.errors import ToolkitError
from train_patches.trl_clients import error_of, replaced

_RANKS = {"rank_offset": 1, "world_size": 2}
_UNCHANGED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values with which tokens are sampled from the model's own distribution."""
_NO_MATTER = {
    "model", "prompt", "n", "max_tokens", "logprobs", "return_token_ids", "return_tokens_as_token_ids", "seed", "stop",
    "stop_token_ids", "ignore_eos",
}  # fmt: skip
"""Fields of a request that change nothing there."""


_Client: Any = vllm_client.VLLMClient  # without types


class ServerClient(_Client):  # type: ignore[misc]
    """TRL's client, which sends weights over gloo and reads the log-probabilities of the sampled distribution.

    Attributes:
        numerics_fingerprint: of the trainer (``toolkit.engine.fingerprint``), which a server in bitwise mode refuses
            where its own differs; None sends none.
        communicator: the group of both processes.
    """

    numerics_fingerprint: Mapping[str, str] | None = None

    def get_server_info(self) -> dict[str, Any]:
        """``vllm_config`` of the server, and which log-probabilities ``generate`` returns."""
        info: dict[str, Any] = super().get_server_info()
        return {**info, "model_config": {**info["model_config"], "logprobs_mode": "processed_logprobs"}}

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        """Make the group of this process and the server; ``device`` of the weights may be any.

        Raises:
            ToolkitError: the server refuses, or does not come.
        """
        self.close_communicator()
        info: dict[str, Any] = {
            "backend": "gloo", "master_address": self._own_address(), "master_port": self.group_port, **_RANKS,
        }  # fmt: skip
        asked = dict(info)
        if self.numerics_fingerprint is not None:
            asked["numerics_fingerprint"] = dict(self.numerics_fingerprint)
        with self._meanwhile("init_weight_transfer_engine", {"init_info": asked}) as response:
            self.communicator: WeightGroup | None = WeightGroup(
                info["master_address"], self.group_port, 0, _RANKS["world_size"], check=lambda: _raised(response)
            )

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, Tensor]]
    ) -> None:
        """Send tensors, which ``metadata`` describes in their order as (name, dtype, shape).

        Raises:
            ToolkitError: the server does not take them, or ended.
        """
        group = self.communicator
        if group is None:
            raise ToolkitError("init_communicator() must come before weights are sent.")
        names, dtype_names, shapes = (list(field) for field in zip(*metadata, strict=True))
        if not self._updating_weights:
            self._start_weight_update()
        update = {"names": names, "dtype_names": dtype_names, "shapes": shapes}
        with self._meanwhile("update_weights", {"update_info": update}) as response:
            group.send((tensor for _, tensor in named_params), check=lambda: _raised(response))
        if not self._updating_weights:
            self._finish_weight_update()

    def close_communicator(self) -> None:
        """End the group."""
        if self.communicator is not None:
            self.communicator.close()
            self.communicator = None

    def _post(self, url: str, **kwargs: Any) -> dict[str, Any]:
        body = kwargs.get("json") or {}
        changed = any(name not in _NO_MATTER and value != _UNCHANGED.get(name) for name, value in body.items())
        sampled = changed and url.endswith("/v1/completions") and body.get("logprobs") == 0
        if sampled:
            kwargs["json"] = {**body, "return_sampling_logprobs": True}
        try:
            found: dict[str, Any] = super()._post(url, **kwargs)
        except Exception as error:
            raise error_of(error, urlsplit(url).path) from None
        if sampled:
            for choice in found["choices"]:
                choice["logprobs"]["token_logprobs"] = choice["sampling_logprobs"]
                choice["logprobs"]["top_logprobs"] = [None] * len(choice["sampling_logprobs"])
        return found

    @contextmanager
    def _meanwhile(self, path: str, body: dict[str, Any]) -> "Iterator[Future[dict[str, Any]]]":
        """A request under way, whose response is read at the end of the block: the server's part of a group's call."""
        with ThreadPoolExecutor(max_workers=1) as executor:
            response = executor.submit(self._post, f"{self.base_url}/{path}", json=body)
            yield response
            response.result()

    def _own_address(self) -> str:
        """Of this machine, as the server reaches it."""
        url = urlsplit(self.base_url)
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        with socket.create_connection((self.host, port), timeout=10) as connection:
            address: str = connection.getsockname()[0]
            return address


def _raised(response: "Future[Any]") -> None:
    """Raise what the server refused."""
    if response.done():
        response.result()


@contextmanager
def server_rollout(numerics_fingerprint: Mapping[str, str] | None = None) -> Iterator[None]:
    """Trainers that are made in the block with ``use_vllm=True, vllm_mode="server"`` use a server of this project.

    Args:
        numerics_fingerprint: see ``ServerClient``; that of the patched model is
            ``toolkit.engine.fingerprint.model_fingerprint(model)``.
    """
    client = type("ServerClient", (ServerClient,), {"numerics_fingerprint": numerics_fingerprint})
    with (
        replaced(vllm_client, "is_vllm_available", lambda *_, **__: True),
        replaced(vllm_generation, "is_vllm_available", lambda *_, **__: True),
        replaced(vllm_generation, "VLLMClient", client),
    ):
        yield
