"""What a decode step of 36 layers costs the host: all but the kernels, which are stubbed."""

import time

import pytest
import torch

import toolkit
from benchmarks.end_to_end.decode import thin
from toolkit.engine.step.sampling import StepSampling


def stubbed(graphs):
    """``graphs`` whose replays compute nothing: logits are zeros, and so is what is sampled."""
    logits: dict[int, torch.Tensor] = {}

    def forward(context, sampling: StepSampling | None = None):
        rows = len(context.batch.tokens)
        return logits.setdefault(rows, torch.zeros(rows, 512))

    graphs.forward = forward


def least_seconds(engine, batch):
    """Of this thread alone, the least of many: other processes take turns on the cores, and share their caches."""
    seconds = []
    for _ in range(100):
        begun = time.thread_time()
        deltas = engine.step()
        seconds.append(time.thread_time() - begun)
        assert len(deltas) == batch
    return min(seconds)


@pytest.mark.soak  # its limit is of a machine without other work
@pytest.mark.parametrize(("batch", "limit"), [(1, 0.001), (64, 0.002)])
def test_a_step_without_its_kernels(batch, limit):
    with toolkit.Engine(thin(), max_num_seqs=batch, max_model_len=512) as engine:
        params = toolkit.SamplingParams(max_tokens=450, temperature=0.8, ignore_eos=True)
        for at in range(batch):
            engine.submit([5, 6, 7 + at], params)
        for _ in range(4):
            engine.step()
        stubbed(engine.backend.graphs)
        found = [least_seconds(engine, batch)]
        while found[-1] > limit and len(found) < 4:  # a fault would show in each
            found.append(least_seconds(engine, batch))
    assert min(found) <= limit, [f"{one * 1e3:.2f} ms" for one in found]
