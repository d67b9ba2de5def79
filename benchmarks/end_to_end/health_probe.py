"""``python -m benchmarks.end_to_end.health_probe URL``: seconds of ``GET /health`` until stdin ends.

It asks 50 times a second and prints one JSON object. A process, so that no client of ``benchmarks.fuzz`` delays it.
"""

import json
import sys
import threading
import time

import httpx


def main() -> None:
    stopped = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        stopped.set()

    threading.Thread(target=watch, daemon=True).start()
    seconds, failures = [], []
    with httpx.Client(base_url=sys.argv[1], timeout=60) as client:
        while not stopped.wait(0.02):
            started = time.perf_counter()
            response = client.get("/health")
            seconds.append(time.perf_counter() - started)
            if response.status_code != 200:
                failures.append(f"/health: status {response.status_code}")
    print(json.dumps({"seconds": seconds, "failures": failures}))


if __name__ == "__main__":
    main()
