"""The short command of ``benchmarks/end_to_end/distributed.py``: ``python -m benchmarks.distributed``."""

import sys

from benchmarks.end_to_end.distributed import main

if __name__ == "__main__":
    sys.exit(main())
