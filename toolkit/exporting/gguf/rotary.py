"""Rotary embeddings as llama.cpp reads them: base, scaling, and factors of the frequencies."""

import math
from typing import TYPE_CHECKING, Any

import torch

from toolkit.errors import ToolkitError, must_be_one_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

SCALINGS = ("default", "linear", "yarn", "llama3")


def rotary_parameters(config: Any) -> dict[str, Any]:
    """The parameters of the layers that see everything; those of windows are ``window_base``'s."""
    given: dict[str, Any] = config.rope_parameters or {}
    found: dict[str, Any] = given.get("full_attention", given)
    return found


def window_base(config: Any) -> float | None:
    """The base of layers with a window, where it is another one; they must not be scaled."""
    given = (config.rope_parameters or {}).get("sliding_attention")
    if given is None:
        return None
    if given.get("rope_type", "default") != "default":
        raise ToolkitError(
            f"rope_type of layers with a window must be 'default' for llama.cpp, got {given['rope_type']!r}."
        )
    return float(given["rope_theta"])


def check_rotary(config: Any, target: str, partial: bool = False) -> None:
    """Raise ToolkitError for a scaling that llama.cpp does not compute; ``partial``: heads may be rotated in part."""
    given = rotary_parameters(config)
    kind = given.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ToolkitError(f"An export to {target!r}: {must_be_one_of('rope_type', kind, SCALINGS)}")
    if not partial and given.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ToolkitError(
            f"An export to {target!r}: partial_rotary_factor must be 1, got {given['partial_rotary_factor']!r}."
        )
    if kind == "yarn":
        factor = given["factor"]
        attention = given.get("attention_factor")
        plain = 0.1 * math.log(factor) + 1.0
        other = [name for name in ("mscale", "mscale_all_dim") if given.get(name)]
        if other or (attention is not None and not math.isclose(attention, plain, rel_tol=1e-6)):
            name = other[0] if other else "attention_factor"
            raise ToolkitError(
                f"An export to {target!r}: {name} must be null, as llama.cpp takes 0.1 ln(factor) + 1, got "
                f"{given[name]!r}."
            )
        if given.get("truncate") is False:
            raise ToolkitError(
                f"An export to {target!r}: truncate must be true, as llama.cpp rounds the ramp, got False."
            )
    window_base(config)


def write_rotary(writer: "GGUFWriter", config: Any, head_size: int) -> None:
    """Add the metadata of base and scaling; ``rotary_factors`` are a tensor."""
    from gguf import RopeScalingType

    given = rotary_parameters(config)
    kind = given.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_size * (given.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(float(given["rope_theta"]))
    window = window_base(config)
    if window is not None:
        writer.add_rope_freq_base_swa(window)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(given["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(given["factor"]))
        original = given.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
        writer.add_rope_scaling_yarn_beta_fast(float(given.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(given.get("beta_slow") or 1.0))


def rotary_factors(config: Any, head_size: int) -> torch.Tensor | None:
    """By what llama.cpp divides each frequency, float32 [head_size / 2]; None where it divides none (all but Llama 3).

    The formula is Llama 3's: frequencies whose wavelength is short are kept, long ones are divided by ``factor``, and
    those between go from one to the other.
    """
    given = rotary_parameters(config)
    if given.get("rope_type", "default") != "llama3":
        return None
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    context = given["original_max_position_embeddings"]
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    wavelengths = 2 * math.pi * given["rope_theta"] ** exponents
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths < context / high, torch.ones_like(between), between)
    return torch.where(wavelengths > context / low, torch.full_like(factors, factor), factors).float()
