"""The row-wise kernels, forward and backward, for ``tools.compile_kernels``: name -> the call that launches them."""

from collections.abc import Callable

import torch

ROWS = 64
WIDTHS = (512, 4096, 8192)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def activation_case(dtype: torch.dtype, width: int, kind: str) -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.activation.triton import activation, activation_backward

        x = torch.empty(ROWS, width, dtype=dtype)
        activation(x, kind)
        activation_backward(x, x, kind)

    return call


def gated_activation_case(dtype: torch.dtype, width: int, kind: str) -> Callable[[], None]:
    """gate and up are the halves of one projection."""

    def call() -> None:
        from toolkit.ops.gated_activation.triton import gated_activation, gated_activation_backward

        gate, up = torch.empty(ROWS, 2 * width, dtype=dtype).chunk(2, -1)
        gated_activation(gate, up, kind)
        gated_activation_backward(torch.empty(ROWS, width, dtype=dtype), gate, up, kind)

    return call


def rms_norm_case(dtype: torch.dtype, width: int) -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.rms_norm.triton import rms_norm, rms_norm_backward

        x, weight = torch.empty(ROWS, width, dtype=dtype), torch.empty(width, dtype=dtype)
        rms_norm(x, weight, 1e-6, 0.0)
        rms_norm_backward(x, x, weight, 1e-6, 0.0)

    return call


def add_rms_norm_case(dtype: torch.dtype, width: int) -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.rms_norm.triton import add_rms_norm, add_rms_norm_backward

        x, weight = torch.empty(ROWS, width, dtype=dtype), torch.empty(width, dtype=dtype)
        add_rms_norm(x, x, weight, 1e-6, 0.0)
        add_rms_norm_backward(x, x, x, weight, 1e-6, 0.0)

    return call


def layer_norm_case(dtype: torch.dtype, width: int) -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.layer_norm.triton import layer_norm, layer_norm_backward

        x, weight = torch.empty(ROWS, width, dtype=dtype), torch.empty(width, dtype=dtype)
        layer_norm(x, weight, weight, 1e-6)
        layer_norm_backward(x, x, weight, weight, 1e-6)

    return call


def token_logprob_case(dtype: torch.dtype, width: int) -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.token_logprob.triton import token_logprob, token_logprob_backward

        logits, targets = torch.empty(ROWS, width, dtype=dtype), torch.zeros(ROWS, dtype=torch.int64)
        logprob, lse = token_logprob(logits, targets)
        token_logprob_backward(logprob, lse, logits, targets, lse)

    return call


def state_write_case(dtype: torch.dtype, width: int) -> Callable[[], None]:
    """Keys as a view of a projection's rows, into a pool of their dtype; and float32 ones into bfloat16."""

    def call() -> None:
        from toolkit.ops.state_write.triton import state_write

        rows = torch.empty(ROWS, 2 * width, dtype=dtype)[:, :width].view(ROWS, -1, 128)
        slots = torch.arange(ROWS)
        state_write(torch.empty(2 * ROWS, width // 128, 128, dtype=dtype), rows, slots)
        state_write(torch.empty(2 * ROWS, 2, width // 128, 128, dtype=torch.bfloat16)[:, 0], rows, slots)

    return call


def adamw_8bit_case() -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.adamw_8bit import new_moments
        from toolkit.ops.adamw_8bit.triton import adamw_8bit
        from toolkit.ops.dynamic_map import dynamic_map, thresholds

        weight = torch.empty(ROWS, 512)
        mean, mean_scale, square, square_scale = new_moments(weight).values()
        tables = [table(signed) for signed in (True, False) for table in (dynamic_map, thresholds)]
        adamw_8bit(
            weight, weight, mean, mean_scale, square, square_scale, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1, *tables
        )  # fmt: skip

    return call


def rotary_case(dtype: torch.dtype, width: int, *, interleaved: bool) -> Callable[[], None]:
    """Heads of 128 channels, a view of a projection's rows; the tables in float32."""

    def call() -> None:
        from toolkit.ops.rotary.triton import rotary

        x = torch.empty(ROWS, 3 * width, dtype=dtype)[:, :width].view(ROWS, -1, 128)
        table = torch.empty(ROWS, 128)
        rotary(x, table, table, interleaved)

    return call


def rotary_write_case(dtype: torch.dtype, *, normed: bool) -> Callable[[], None]:
    """32 heads of queries and 8 of keys and values, parts of one projection's rows; the tables in the model's dtype."""

    def call() -> None:
        from toolkit.ops.rotary_write.triton import rotary_write

        heads = [32 * 128, 8 * 128, 8 * 128]
        q, k, v = torch.empty(ROWS, sum(heads), dtype=dtype).split(heads, 1)
        weight, table = torch.empty(128, dtype=dtype) if normed else None, torch.empty(ROWS, 128, dtype=dtype)
        pool, slots = torch.empty(4 * ROWS, 8, 128, dtype=dtype), torch.empty(ROWS, dtype=torch.int64)
        rotary_write(q, k, v, weight, weight, 1e-6 if normed else None, 0.0, table, table, False, pool, pool, slots)

    return call


def rotary_tables_case(dtype: torch.dtype, *, axes: bool) -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.rotary.triton_tables import rotary_tables

        axis = torch.arange(64) % 3 if axes else None
        rotary_tables(
            torch.arange(ROWS).expand(3, ROWS) if axes else torch.arange(ROWS), torch.empty(64), 1.0, dtype, axis
        )

    return call


def cases() -> dict[str, Callable[[], None]]:
    """Every row-wise kernel at three widths in two dtypes."""
    from toolkit.ops.activation import KINDS, plain_kinds

    found: dict[str, Callable[[], None]] = {"adamw_8bit fp32": adamw_8bit_case()}
    for short, dtype in DTYPES.items():
        for kind in plain_kinds():
            found[f"activation {kind} {short} 4096"] = activation_case(dtype, 4096, kind)
        for kind in KINDS:
            found[f"gated_activation {kind} {short} 4096"] = gated_activation_case(dtype, 4096, kind)
        for axes in (False, True):
            found[f"rotary_tables{' axes' * axes} {short} 128"] = rotary_tables_case(dtype, axes=axes)
        for normed in (False, True):
            found[f"rotary_write{' normed' * normed} {short} 128"] = rotary_write_case(dtype, normed=normed)
        for width in WIDTHS:
            for interleaved in (False, True):
                name = f"rotary {'interleaved' if interleaved else 'half'} {short} {width}"
                found[name] = rotary_case(dtype, width, interleaved=interleaved)
            found[f"gated_activation silu {short} {width}"] = gated_activation_case(dtype, width, "silu")
            found[f"layer_norm {short} {width}"] = layer_norm_case(dtype, width)
            found[f"token_logprob {short} {width}"] = token_logprob_case(dtype, width)
            found[f"state_write {short} {width}"] = state_write_case(dtype, width)
            found[f"rms_norm {short} {width}"] = rms_norm_case(dtype, width)
            found[f"add_rms_norm {short} {width}"] = add_rms_norm_case(dtype, width)
        # Rows that are walked in blocks, and a vocabulary that does not fill its last block.
        found[f"rms_norm {short} 16384"] = rms_norm_case(dtype, 16384)
        found[f"layer_norm {short} 16384"] = layer_norm_case(dtype, 16384)
        found[f"token_logprob {short} 151936"] = token_logprob_case(dtype, 151936)
    return found
