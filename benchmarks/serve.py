"""The short command of ``benchmarks/end_to_end/serve.py``: ``python -m benchmarks.serve``."""

from benchmarks.end_to_end.serve import main

if __name__ == "__main__":
    main()
