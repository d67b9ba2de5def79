"""The short command of ``benchmarks/end_to_end/speculation.py``: ``python -m benchmarks.speculation``."""

from benchmarks.end_to_end.speculation import main

if __name__ == "__main__":
    main()
