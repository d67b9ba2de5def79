"""The short command of ``benchmarks/end_to_end/low_precision.py``: ``python -m benchmarks.low_precision``."""

from benchmarks.end_to_end.low_precision import main

if __name__ == "__main__":
    main()
