"""The kinds of models: their columns, and what measures a row of each."""

from collections.abc import Callable, Sequence

from toolkit.testing.architectures import CAUSAL, IMAGE_TEXT
from toolkit.testing.coverage import causal, image_text
from toolkit.testing.coverage.row import Column, Row

COLUMNS: dict[str, Sequence[Column]] = {CAUSAL: causal.COLUMNS, IMAGE_TEXT: image_text.COLUMNS}
MEASURES: dict[str, Callable[[str], Row]] = {CAUSAL: causal.measure, IMAGE_TEXT: image_text.measure}
