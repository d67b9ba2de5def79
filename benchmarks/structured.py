"""The short command of ``benchmarks/end_to_end/structured.py``: ``python -m benchmarks.structured``."""

from benchmarks.end_to_end.structured import main

if __name__ == "__main__":
    main()
