"""How a command's threads share the CPUs with others: settings that reach OpenMP, in real processes."""

import os
import subprocess
import sys

import pytest

from toolkit.machine import cpu_count, describe_cpus

# What a command does first, then what OpenMP says that it was given, and torch's threads.
COMMAND = """
import sys
from toolkit.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
import torch
print("threads", torch.get_num_threads())
"""

# The same step with every setting, beside neighbours that keep each CPU busy; CPU seconds a step.
STEP = """
import sys, time, torch, toolkit
from toolkit.testing.models import random_model
model = random_model("llama")
toolkit.patch(model)
ids = torch.randint(3, 300, (8, 64))
for step in range(8):
    if step == 2:
        start = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
print((time.process_time() - start) / 6)
"""


def start(code, cpus=None, **settings):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "LOCAL_WORLD", "MKL_"))}
    bind = None if cpus is None else lambda: os.sched_setaffinity(0, cpus)
    process = subprocess.run(
        [sys.executable, "-c", code], env=kept | settings, preexec_fn=bind, capture_output=True, text=True, check=True
    )
    return process.stdout, process.stderr


def test_waiting_threads_of_a_command_give_their_cpu_away():
    out, err = start(COMMAND, OMP_DISPLAY_ENV="true")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in err
    assert f"threads {cpu_count()}" in out


def test_what_the_environment_says_stays():
    out, err = start(COMMAND, OMP_DISPLAY_ENV="true", OMP_WAIT_POLICY="active", OMP_NUM_THREADS="1")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in err
    assert "threads 1" in out


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs cannot be bound here")
def test_threads_follow_affinity_and_workers():
    mine = sorted(os.sched_getaffinity(0))
    assert "threads 1" in start(COMMAND, cpus=mine[:1])[0]
    assert "threads 1" in start(COMMAND, LOCAL_WORLD_SIZE=str(len(mine)))[0]


def test_the_line_says_threads_cpus_and_waits(monkeypatch):
    monkeypatch.setattr("toolkit.machine.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (7.25, 0.0, 0.0))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert describe_cpus(1) == (
        "1 thread on 2 CPUs shared by 2 processes, which are busy (load 7.2); waiting threads give their CPU away"
    )
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.0, 0.0))
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert describe_cpus(2) == "2 threads on 2 CPUs; waiting threads spin (OMP_WAIT_POLICY=passive: not)"


@pytest.mark.soak
@pytest.mark.skipif(cpu_count() < 2, reason="two threads need two CPUs")
def test_a_busy_neighbour_costs_no_spinning():
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cpu_count())]
    try:
        threads = {"OMP_NUM_THREADS": str(cpu_count())}
        passive = float(start(STEP, OMP_WAIT_POLICY="passive", **threads)[0])
        spinning = float(start(STEP, OMP_WAIT_POLICY="active", **threads)[0])
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert passive < spinning / 2
