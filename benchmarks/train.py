"""The short command of ``benchmarks/end_to_end/train.py``: ``python -m benchmarks.train``."""

from benchmarks.end_to_end.train import main

if __name__ == "__main__":
    main()
