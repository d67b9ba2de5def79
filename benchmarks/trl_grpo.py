"""The short command of ``benchmarks/end_to_end/trl_grpo.py``: ``python -m benchmarks.trl_grpo``."""

from benchmarks.end_to_end.trl_grpo import main

if __name__ == "__main__":
    main()
