"""What a patch does to each architecture that transformers registers, measured on a small random model of it.

A kind of models is one file: its columns, and what measures a row. An architecture is covered when every column holds,
unsupported when something could not be measured (the row says why) and nothing is wrong, and wrong when a measured
number is out of its limit.
"""

from toolkit.testing.coverage.kinds import COLUMNS
from toolkit.testing.coverage.row import Column, Row
from toolkit.testing.coverage.workers import measure_all

__all__ = ["COLUMNS", "Column", "Row", "measure_all"]
