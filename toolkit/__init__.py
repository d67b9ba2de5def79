"""Patch a Hugging Face model once; the same modules, kernels and paged state train it, roll it out and serve it.

>>> import toolkit
>>> report = toolkit.patch(model)
>>> logprobs = toolkit.token_logprobs(model, [[1, 2, 3]])
>>> with toolkit.Engine(model, tokenizer) as engine:
...     outputs = engine.generate(["def main():"], toolkit.SamplingParams(max_tokens=32))
>>> toolkit.export(model, "exported")
"""

from typing import TYPE_CHECKING

from toolkit.lazy import lazy_names

if TYPE_CHECKING:
    from toolkit.engine import AsyncEngine, Engine, SamplingParams, StructuredOutputsParams
    from toolkit.engine.pooling import PoolingParams
    from toolkit.exporting import export
    from toolkit.llm import LLM, LoRARequest
    from toolkit.patching import PatchReport, patch, token_logprobs, unpatch, weights_changed
    from toolkit.patching.tensor_parallel import tensor_parallel
    from toolkit.quantised import quantise

# Resolved on first use, so that `toolkit --help` and the ops do not wait for transformers.
_HOMES = {
    "AsyncEngine": "toolkit.engine",
    "Engine": "toolkit.engine",
    "LLM": "toolkit.llm",
    "LoRARequest": "toolkit.llm",
    "PoolingParams": "toolkit.engine.pooling",
    "SamplingParams": "toolkit.engine",
    "StructuredOutputsParams": "toolkit.engine",
    "export": "toolkit.exporting",
    "PatchReport": "toolkit.patching",
    "patch": "toolkit.patching",
    "quantise": "toolkit.quantised",
    "tensor_parallel": "toolkit.patching.tensor_parallel",
    "token_logprobs": "toolkit.patching",
    "unpatch": "toolkit.patching",
    "weights_changed": "toolkit.patching",
}
__all__ = [
    "LLM",
    "AsyncEngine",
    "Engine",
    "LoRARequest",
    "PatchReport",
    "PoolingParams",
    "SamplingParams",
    "StructuredOutputsParams",
    "export",
    "patch",
    "quantise",
    "tensor_parallel",
    "token_logprobs",
    "unpatch",
    "weights_changed",
]
__version__ = "0.1.0"

__getattr__ = lazy_names(__name__, _HOMES)
