"""The short command of ``benchmarks/end_to_end/grpo.py``: ``python -m benchmarks.grpo``."""

from benchmarks.end_to_end.grpo import main

if __name__ == "__main__":
    main()
