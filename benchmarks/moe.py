"""The short command of ``benchmarks/end_to_end/moe.py``: ``python -m benchmarks.moe``."""

from benchmarks.end_to_end.moe import main

if __name__ == "__main__":
    main()
