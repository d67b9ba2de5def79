"""ExecuTorch programs of prefill and decode step, for phones and other devices."""

from toolkit.exporting.programs import ProgramTarget


class ExecuTorch(ProgramTarget, name="executorch"):
    """``prefill.pte`` and ``decode.pte``, weights inside; XNNPACK computes what it takes."""

    exporter = "executorch"
    runtime = "executorch"

    def packages(self, quantise: str | None) -> tuple[str, ...]:
        return ("executorch",)
