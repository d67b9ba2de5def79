"""The short command of ``benchmarks/end_to_end/long_sequence.py``: ``python -m benchmarks.long_sequence``."""

from benchmarks.end_to_end.long_sequence import main

if __name__ == "__main__":
    main()
