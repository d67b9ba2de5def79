"""The short command of ``benchmarks/end_to_end/live.py``: ``python -m benchmarks.live``."""

from benchmarks.end_to_end.live import main

if __name__ == "__main__":
    main()
