"""OpenVINO's representation of prefill and decode step."""

from typing import Any, ClassVar

from toolkit.exporting.programs import ProgramTarget


class OpenVino(ProgramTarget, name="openvino"):
    """``openvino_prefill.xml`` and ``openvino_decode.xml``, weights beside them, float32 where the model has float32.

    The cache is an input and an output: a state inside a program could not go from the prefill to the decode step.
    """

    exporter = "openvino"
    runtime = "openvino"
    options: ClassVar[dict[str, Any]] = {"stateful": False}
    # Without the hint OpenVINO computes in bfloat16 where the CPU has it.
    running: ClassVar[dict[str, Any]] = {"device": "cpu", "config": {"INFERENCE_PRECISION_HINT": "f32"}}

    def packages(self, quantise: str | None) -> tuple[str, ...]:
        return ("openvino",)
