"""What the Triton functions of several activations share, and how a kind's own ones come to Triton.

All of it is on float32 tiles; NaN stays NaN, which the hardware's minimum and maximum would not let it.
"""

from types import ModuleType
from typing import Any

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    """x within [low, high]."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def finite_below(x):
    """x, with the lowest finite number in place of -inf: times 0 it is -0, not NaN."""
    return tl.where(x < -3.4028234663852886e38, -3.4028234663852886e38, x)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_both(x):
    """sigmoid(x) and sigmoid(-x), neither by subtraction from one."""
    tail = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + tail)
    small = tail * large
    return tl.where(x < 0.0, small, large), tl.where(x < 0.0, large, small)


@triton.jit
def normal(x):
    """Phi(x) and phi(x) of the normal distribution.

    Phi(-|x|) = exp(-x^2/2) q(t), t = 1/(1 + 0.35 |x|), so that the lower tail keeps its relative precision; q is
    the polynomial of ``toolkit/ops/native/elementary.h``, fitted to a relative error of 4e-8 where exp(-x^2/2) > 0.
    """
    t = 1.0 / (tl.abs(x) * 0.35 + 1.0)
    q = t * -0.02914605475962162 + 0.1439729630947113
    q = q * t - 0.25571703910827637
    q = q * t + 0.15917754173278809
    q = q * t - 0.023112984374165535
    q = q * t + 0.1055099293589592
    q = q * t + 0.11983231455087662
    q = q * t + 0.13986192643642426
    q = q * t + 0.13962140679359436
    bell = tl.exp(x * x * -0.5)
    tail = bell * t * q
    return tl.where(x < 0.0, tail, 1.0 - tail), bell * 0.3989422804014327


def build(module: ModuleType) -> tuple[Any, Any]:
    """``triton_value`` and ``triton_both`` of a kind's file as Triton functions that see the names above."""
    for name in ("tl", "clamp", "finite_below", "sigmoid", "sigmoid_both", "normal"):
        vars(module).setdefault(name, globals()[name])
    return triton.jit(module.triton_value), triton.jit(module.triton_both)
