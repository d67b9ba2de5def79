"""The short command of ``benchmarks/end_to_end/adapters.py``: ``python -m benchmarks.adapters``."""

from benchmarks.end_to_end.adapters import main

if __name__ == "__main__":
    main()
