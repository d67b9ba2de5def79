"""The short command of ``benchmarks/end_to_end/http_overhead.py``: ``python -m benchmarks.http_overhead``."""

from benchmarks.end_to_end.http_overhead import main

if __name__ == "__main__":
    main()
