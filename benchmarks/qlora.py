"""The short command of ``benchmarks/end_to_end/qlora.py``: ``python -m benchmarks.qlora``."""

from benchmarks.end_to_end.qlora import main

if __name__ == "__main__":
    main()
