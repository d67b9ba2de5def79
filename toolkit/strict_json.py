"""JSON as RFC 8259 has it: what other programs read."""

import json
import math
from typing import Any


def strict_json(value: Any, **options: Any) -> str:
    """``json.dumps``, with null for NaN and infinities, for which JSON has no number.

    Args:
        options: of ``json.dumps``.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
