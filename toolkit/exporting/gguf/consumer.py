"""llama.cpp on a GGUF file: what it generates, its tokens of a text, its log-probabilities."""

import importlib.util
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class LlamaCpp:
    """llama.cpp's server of the package xllamacpp, on a port of this machine.

    Args:
        file: a GGUF file.
        context: most tokens of a prompt and its continuation.
        adapter: a GGUF file of LoRA adapters that act.
    """

    def __init__(self, file: Path, context: int, adapter: Path | None = None) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.port, settings.verbosity = 0, 0
        settings.n_ctx, settings.n_parallel, settings.fit_params = context + 8, 1, False
        settings.n_batch = settings.n_ubatch = min(512, context + 8)
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.warmup = False
        # A cache of the windows alone, used again for a short prompt after a longer one, gives other tokens.
        settings.swa_full = True
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server: Any = xllamacpp.Server(settings)
        self._letter = self.tokenize("a")[-1]

    @staticmethod
    def installed() -> bool:
        """Whether the package is."""
        return importlib.util.find_spec("xllamacpp") is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server = None

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, token by token: those that end a text do not end it."""
        tokens: list[int] = []
        for _ in range(max_tokens):
            found = self.log_probabilities([*prompt, *tokens], 1)
            tokens.append(next(iter(found)))
        return tokens

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with those around it."""
        return [
            int(token)
            for token in self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        ]

    def render(self, messages: list[dict[str, str]]) -> str:
        """A conversation by the file's chat template."""
        return str(self._post("/apply-template", messages=messages)["prompt"])

    def log_probabilities(self, prompt: Sequence[int], most: int) -> dict[int, float]:
        """Of the token that follows ``prompt``: those of the ``most`` most probable tokens, the most probable first.

        The server leaves them out where it samples the end of a text or a part of a character. It is made to sample a
        letter; probabilities are those from before.
        """
        response = self._post(
            "/completion",
            prompt=list(prompt),
            n_predict=1,
            n_probs=most,
            temperature=0.0,
            samplers=["top_k"],
            top_k=1,
            logit_bias=[[self._letter, 1e6]],
            cache_prompt=True,
        )
        (first,) = response["completion_probabilities"]
        return {int(one["id"]): float(one["logprob"]) for one in first["top_logprobs"]}

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            content: dict[str, Any] = json.load(response)
        return content
