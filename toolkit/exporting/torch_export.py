"""``torch.export`` programs of prefill and decode step, which torch runs without Python code of the model."""

from toolkit.exporting.programs import ProgramTarget


class TorchExport(ProgramTarget, name="torch-export"):
    """``prefill.pt2`` and ``decode.pt2``."""

    exporter = "dynamo"
