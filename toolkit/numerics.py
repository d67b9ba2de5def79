"""The two numerics modes and what each promises.

``fast``     shared kernels, cuBLAS / MKL GEMMs; the mismatch between rollout and training is measured and reported.
``bitwise``  batch-invariant: the log-probability that the engine returns for a token is ``torch.equal`` to the one that
             the training forward computes for it, for every batch, chunk, prefix hit and preemption. Default on CPU.
"""

from enum import StrEnum

import torch

from toolkit.errors import ToolkitError, must_be_one_of


class Numerics(StrEnum):
    """A numerics mode, by its name."""

    FAST = "fast"
    BITWISE = "bitwise"

    @classmethod
    def choose(cls, value: "str | Numerics | None", device: torch.device) -> "Numerics":
        """The mode asked for, or the default of ``device``: bitwise on CPU, fast elsewhere.

        Raises:
            ToolkitError: an unknown mode.
        """
        if value is None:
            return cls.BITWISE if device.type == "cpu" else cls.FAST
        try:
            return cls(value)
        except ValueError:
            raise ToolkitError(must_be_one_of("numerics", value, cls)) from None
