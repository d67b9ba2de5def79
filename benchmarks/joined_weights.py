"""The short command of ``benchmarks/end_to_end/joined_weights.py``: ``python -m benchmarks.joined_weights``."""

from benchmarks.end_to_end.joined_weights import main

if __name__ == "__main__":
    main()
