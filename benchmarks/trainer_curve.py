"""The short command of ``benchmarks/end_to_end/trainer_curve.py``: ``python -m benchmarks.trainer_curve``."""

from benchmarks.end_to_end.trainer_curve import main

if __name__ == "__main__":
    main()
