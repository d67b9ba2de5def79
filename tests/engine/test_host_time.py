"""What a decode step of 36 layers costs the host: all but the kernels, which are stubbed."""

import pytest

from benchmarks.end_to_end.decode import host_seconds


@pytest.mark.soak  # its limit is of a machine without other work
@pytest.mark.parametrize(("batch", "limit"), [(1, 0.001), (64, 0.002)])
def test_a_step_without_its_kernels(batch, limit):
    """The least of many: other processes take turns on the cores, and share their caches."""
    found = [min(host_seconds(batch))]
    while found[-1] > limit and len(found) < 4:  # a fault would show in each
        found.append(min(host_seconds(batch)))
    assert min(found) <= limit, [f"{one * 1e3:.2f} ms" for one in found]
