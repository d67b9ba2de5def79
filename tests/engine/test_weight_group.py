"""Tensors from one process into others over gloo, here from one thread into others."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from tests.helpers.routers import free_port
from toolkit.engine import weight_group
from toolkit.engine.weight_group import TensorInfo, WeightGroup
from toolkit.errors import ToolkitError

ADDRESS = "127.0.0.1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def tensors(seed):
    """Of all shapes, some empty, some not contiguous."""
    chance = random.Random(seed)
    made = {}
    for at in range(40):
        shape = [chance.randrange(5) for _ in range(chance.randrange(4))]
        one = torch.randint(0, 99, shape).to(chance.choice(DTYPES))
        made[f"layer.{at}"] = one.transpose(0, -1) if len(shape) > 1 and at % 2 else one
    return made


def together(*calls):
    with ThreadPoolExecutor(len(calls)) as threads:
        return [one.result() for one in [threads.submit(call) for call in calls]]


def group(size, buffer_size=weight_group.BUFFER_SIZE):
    port = free_port()
    ranks = [lambda rank=rank: WeightGroup(ADDRESS, port, rank, size, buffer_size) for rank in range(size)]
    return together(*ranks)


@pytest.mark.parametrize(("size", "buffer_size"), [(2, 0), (2, 100), (3, 2**20)])
def test_each_receives_what_is_sent(size, buffer_size):
    sender, *receivers = group(size, buffer_size)
    for seed in range(2):
        sent = tensors(seed)
        described = [TensorInfo(name, one.dtype, tuple(one.shape)) for name, one in sent.items()]
        _, *found = together(
            lambda sent=sent: sender.send(iter(sent.values())),
            *(lambda one=one, described=described: one.receive(described) for one in receivers),
        )
        for received in found:
            assert list(received) == list(sent)
            for name, one in sent.items():
                assert received[name].dtype == one.dtype
                assert torch.equal(received[name], one)
    for one in (sender, *receivers):
        one.close()


def test_whoever_waits_is_told(monkeypatch):
    def refused():
        raise ToolkitError("The server refused the weights.")

    with pytest.raises(ToolkitError, match="The server refused the weights"):
        WeightGroup(ADDRESS, free_port(), 0, 2, check=refused)
    sender, receiver = group(2)
    with pytest.raises(ToolkitError, match="The server refused the weights"):
        sender.send([torch.zeros(3)], refused)
    with pytest.raises(ToolkitError, match=r"the other process ended or fell silent: this process has left\."):
        sender.send([torch.zeros(3)])
    _, receiver = group(2)
    closing = threading.Timer(0.05, receiver.close)
    closing.start()
    with pytest.raises(ToolkitError, match="the other process ended or fell silent"):
        receiver.receive([TensorInfo("a", torch.float32, (3,))])
    closing.join()
    sender, receiver = group(2)
    del sender  # and its store
    with pytest.raises(ToolkitError, match="the other process ended or fell silent"):
        receiver.receive([TensorInfo("a", torch.float32, (3,))])
    monkeypatch.setattr(weight_group, "_JOIN", timedelta(milliseconds=200))
    with pytest.raises(ToolkitError, match=r"the group of 2 processes at .* did not come together"):
        WeightGroup(ADDRESS, free_port(), 0, 2)
    with pytest.raises(ToolkitError, match=r"the group of 2 processes at .* did not come together"):
        WeightGroup(ADDRESS, free_port(), 1, 2)
