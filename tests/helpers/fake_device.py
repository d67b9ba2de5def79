"""A device that records graphs, on the CPU: it runs what it records, at fixed addresses, and poisons its memory."""

from toolkit.engine.step.graph import capture
from toolkit.engine.step.recorded import recorded_replay


class FakeDevice:
    """A ``GraphDevice``. ``calls``: what was asked of it, in order, with the rows of what was recorded."""

    def __init__(self):
        self.calls = []

    def takes(self, tensor):
        return tensor.device.type == "cpu"

    def warm_up(self, run):
        self.calls.append(("warm_up", len(run())))

    def record(self, run):
        replay = recorded_replay(capture(run, []))
        self.calls.append(("record", len(replay())))
        return replay, replay()
