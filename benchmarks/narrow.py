"""The short command of ``benchmarks/end_to_end/narrow.py``: ``python -m benchmarks.narrow``."""

from benchmarks.end_to_end.narrow import main

if __name__ == "__main__":
    main()
