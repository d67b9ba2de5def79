"""The short command of ``benchmarks/end_to_end/moe_overlap.py``: ``python -m benchmarks.moe_overlap``."""

from benchmarks.end_to_end.moe_overlap import main

if __name__ == "__main__":
    main()
