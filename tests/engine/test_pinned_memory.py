"""Memory between host and device: a transfer has the numbers of its time, however late the device makes it."""

from types import SimpleNamespace

import pytest
import torch

from toolkit.engine.step import cuda_device
from toolkit.engine.step.cuda_device import ReadBack, Staging


class Queue:
    """Transfers that a device makes in order, as late as it may: once someone waits for an event behind them."""

    def __init__(self):
        self.waiting, self.done = [], 0

    def until(self, count):
        while self.done < count:
            self.waiting[self.done]()
            self.done += 1


class LateTensor:
    """A tensor to which others are copied at once, or by the queue."""

    def __init__(self, queue, count):
        self.queue, self.tensor, self.device = queue, torch.zeros(count), None
        self.shape, self.dtype = self.tensor.shape, self.tensor.dtype

    def copy_(self, source, non_blocking=False):
        def copy():
            self.tensor.copy_(getattr(source, "tensor", source))

        if non_blocking:
            self.queue.waiting.append(copy)
        else:
            copy()


@pytest.fixture
def queue(monkeypatch):
    found = Queue()

    class Event:
        def __init__(self):
            self.count = 0

        def record(self, stream):
            self.count = len(found.waiting)

        def synchronize(self):
            found.until(self.count)

    cuda = SimpleNamespace(Event=Event, current_stream=lambda device: None)
    empty = lambda shape, dtype, pin_memory: LateTensor(found, shape[0])  # noqa: E731
    monkeypatch.setattr(cuda_device, "torch", SimpleNamespace(cuda=cuda, empty=empty))
    return found


def test_the_host_writes_the_next_inputs_while_a_transfer_waits(queue):
    memory, arrived = torch.zeros(3), []
    staging, target = Staging(memory), LateTensor(queue, 3)
    for step in range(12):
        memory.fill_(step)
        staging.upload(memory, target)
        queue.waiting.append(lambda: arrived.append(target.tensor[0].item()))  # what the step behind it reads
    assert len(arrived) >= 12 - 4  # two are under way at most, none waits for longer
    queue.until(len(queue.waiting))
    assert arrived == list(range(12))


def test_a_result_is_read_after_the_next_one_came(queue):
    read_back, results, reads = ReadBack(), [torch.full((4,), float(at)) for at in range(9)], []
    for at, result in enumerate(results):
        reads.append(read_back(result))
        if at:
            queue.until(len(queue.waiting))
            assert reads[at - 1]().tensor.tolist() == [at - 1] * 4
    assert reads[-1]().tensor.tolist() == [8] * 4
    other = read_back(torch.ones(2))  # of another shape
    assert reads[-1]().tensor.tolist() == [8] * 4
    assert other().tensor.tolist() == [1, 1]
