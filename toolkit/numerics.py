"""The two tiers of numerics and what each promises.

``fast``     shared kernels, the vendor's matrix products; a mismatch between rollout and training is
             measured and reported, not excluded.
``bitwise``  the log-probability that the engine returns for a token is ``torch.equal`` to the one the
             training forward computes for it, whatever the batch, chunk, prefix hit, preemption or
             neighbour. Default on CPU.
"""

from enum import StrEnum

import torch

from toolkit.errors import ToolkitError


class Numerics(StrEnum):
    FAST = "fast"
    BITWISE = "bitwise"

    @classmethod
    def choose(cls, value: "str | Numerics | None", device: torch.device) -> "Numerics":
        """The tier asked for, or the default of ``device``: bitwise on CPU, fast elsewhere."""
        if value is None:
            return cls.BITWISE if device.type == "cpu" else cls.FAST
        try:
            return cls(value)
        except ValueError:
            allowed = ", ".join(f"'{tier}'" for tier in cls)
            raise ToolkitError(f"numerics is {value!r}; allowed are {allowed}.") from None
