"""The short command of ``benchmarks/end_to_end/perplexity.py``: ``python -m benchmarks.perplexity FOLDER``."""

from benchmarks.end_to_end.perplexity import main

if __name__ == "__main__":
    main()
