"""Rollout workers: an engine in another process than the trainer's, whose calls and weights any transport brings."""

import asyncio
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.engine import AsyncEngine, Engine, SamplingParams
from toolkit.engine.fingerprint import numerics_fingerprint
from toolkit.engine.new_weights import write_new_weights
from toolkit.engine.outputs import Completion
from toolkit.engine.prompts import Prompt
from toolkit.engine.request_handle import RequestHandle
from toolkit.loading import read_new_weights


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as bytes, which processes of one machine share without a copy.

    Args:
        data: uint8, contiguous.
        dtype: of the tensor.
        shape: of the tensor.
    """

    data: np.ndarray[Any, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "PackedTensor":
        """The bytes of a tensor on any device."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return cls(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """The tensor over the same bytes, to be read only."""
        with warnings.catch_warnings():  # that the bytes of the object store cannot be written
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self.data).view(self.dtype).reshape(self.shape)


Weights = dict[str, PackedTensor] | str
"""By name, or the folder where they are."""


def packed(weights: Mapping[str, Tensor]) -> dict[str, PackedTensor]:
    """The tensors as bytes; names of one tensor have one entry, so that tied weights travel once."""
    found: dict[tuple[Any, ...], PackedTensor] = {}
    by_name = {}
    for name, tensor in weights.items():
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in found or not tensor.numel():
            found[key] = PackedTensor.of(tensor)
        by_name[name] = found[key]
    return by_name


@dataclass(frozen=True)
class ModelSpec:
    """Of what a model is built in another process, its weights apart.

    Args:
        kind: its class.
        config: its configuration.
        generation_config: which has the tokens that end a text; None for a model without.
        dtypes: of its parameters, by name.
        device: where its weights are loaded to.
        numerics: mode of the patch; None is the device's default.
    """

    kind: Any
    config: Any
    generation_config: Any
    dtypes: dict[str, torch.dtype]
    device: str
    numerics: str | None

    def build(self) -> nn.Module:
        """The model, with any weights."""
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model: Any = self.kind._from_config(self.config, attn_implementation="eager")
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        for name, parameter in model.named_parameters():
            parameter.data = torch.zeros(parameter.shape, dtype=self.dtypes[name], device=self.device)
        built: nn.Module = model.to(self.device).eval()
        return built


class Started(NamedTuple):
    """Of an engine that is ready.

    Attributes:
        numerics: its fingerprint.
        max_model_len: its own.
    """

    numerics: dict[str, str]
    max_model_len: int


class Worker:
    """An engine on weights that another process sends. Methods are coroutines, of which many may run at a time."""

    def __init__(self) -> None:
        self._writing = asyncio.Lock()
        self._versions: dict[int, int] = {}  # the sender's, by the engine's
        self._handles: set[RequestHandle] = set()

    async def start(
        self, spec: ModelSpec, tokenizer: Any, engine_args: dict[str, Any], version: int, weights: Weights
    ) -> "Started":
        """Make the engine on the weights."""
        started = self.begin(await asyncio.to_thread(spec.build), tokenizer, engine_args, version, spec.numerics)
        await self.load(version, weights)
        return started

    def begin(
        self, model: nn.Module, tokenizer: Any, engine_args: dict[str, Any], version: int, numerics: str | None = None
    ) -> "Started":
        """Make the engine on a model that is there already, whose weights are of ``version``."""
        self.model = model
        engine = Engine(model, tokenizer, numerics=numerics, **engine_args)
        self.engine = AsyncEngine(engine)
        self._versions[engine.see_weights()] = version
        return Started(numerics_fingerprint(engine.backend), engine.max_model_len)

    async def load(self, version: int, weights: Weights) -> None:
        """Write weights between two steps; tokens that follow are of ``version``."""
        state = await asyncio.to_thread(self._read, weights)
        async with self._writing:
            own = await asyncio.to_thread(write_new_weights, self.engine, self.model, state)
            self._versions[own] = version

    def _read(self, weights: Weights) -> Mapping[str, Tensor]:
        if isinstance(weights, str):
            return read_new_weights(weights, self.model, "weight_folder")
        return {name: one.tensor() for name, one in weights.items()}

    async def generate(self, prompt: Prompt, params: SamplingParams) -> list[Completion]:
        """The completions of a prompt; their weight versions are the sender's."""
        handle = self.engine.submit([prompt], [params])
        self._handles.add(handle)
        try:
            await handle.wait_accepted()
            found = [delta.finished async for delta in handle if delta.finished is not None]
        finally:
            handle.cancel()
            self._handles.discard(handle)
        async with self._writing:  # a step may have run before ``load`` noted its version
            for one in found:
                one.weight_versions = [self._versions[version] for version in one.weight_versions]
        return sorted(found, key=lambda one: one.index)

    def abort(self) -> int:
        """End all requests under way, which return what they have; how many there were."""
        for handle in self._handles:
            handle.cancel()
        return len(self._handles)

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    async def stats(self) -> dict[str, float]:
        """The engine's."""
        return self.engine.stats()
