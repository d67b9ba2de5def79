"""The short command of ``benchmarks/end_to_end/decode.py``: ``python -m benchmarks.decode``."""

from benchmarks.end_to_end.decode import main

if __name__ == "__main__":
    main()
