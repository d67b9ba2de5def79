"""The short command of ``benchmarks/end_to_end/fuzz.py``: ``python -m benchmarks.fuzz``."""

from benchmarks.end_to_end.fuzz import main

if __name__ == "__main__":
    main()
