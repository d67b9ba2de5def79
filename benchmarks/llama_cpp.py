"""The short command of ``benchmarks/end_to_end/llama_cpp.py``: ``python -m benchmarks.llama_cpp``."""

from benchmarks.end_to_end.llama_cpp import main

if __name__ == "__main__":
    main()
