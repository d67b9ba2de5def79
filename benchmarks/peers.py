"""The short command of ``benchmarks/end_to_end/peers.py``: ``python -m benchmarks.peers``."""

from benchmarks.end_to_end.peers import main

if __name__ == "__main__":
    main()
