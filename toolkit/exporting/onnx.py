"""ONNX graphs of prefill and decode step, which ONNX Runtime runs."""

from toolkit.exporting.programs import ProgramTarget


class Onnx(ProgramTarget, name="onnx"):
    """``prefill.onnx`` and ``decode.onnx``, weights beside them."""

    exporter = "onnx"
    runtime = "onnxruntime"

    def packages(self, quantise: str | None) -> tuple[str, ...]:
        return ("onnx", "onnxscript")
