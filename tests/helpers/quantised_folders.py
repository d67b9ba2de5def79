"""Checkpoints in other libraries' layouts, written by hand from the definitions of the formats."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(codes: Tensor, bits: int = 4, order: Any = None) -> Tensor:
    """int32 [..., n bits / 32]: code ``order[j]`` of a word from bit ``bits j`` on, one at a time."""
    per = 32 // bits
    order = range(per) if order is None else order
    rows = codes.reshape(-1, codes.shape[-1]).tolist()
    words = []
    for row in rows:
        for start in range(0, len(row), per):
            word = sum(int(row[start + at]) << (bits * j) for j, at in enumerate(order))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return torch.tensor(words, dtype=torch.int32).view(*codes.shape[:-1], -1)


def gptq(generator: torch.Generator, outputs: int, inputs: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a layer in groups of 32, and the weight that they stand for."""
    codes, zero, scale = _integers(generator, outputs, inputs, 1)
    tensors = {
        "qweight": packed(codes.t().contiguous().t()).t().contiguous(),
        "qzeros": packed((zero - 1).t().contiguous()),
        "scales": scale.t().contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // 32,
    }
    return tensors, _value(codes, zero, scale)


def awq(generator: torch.Generator, outputs: int, inputs: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, zero, scale = _integers(generator, outputs, inputs, 0)
    tensors = {
        "qweight": packed(codes.t().contiguous(), order=ORDER),
        "qzeros": packed(zero.t().contiguous(), order=ORDER),
        "scales": scale.t().contiguous(),
    }
    return tensors, _value(codes, zero, scale)


def w4a16(generator: torch.Generator, outputs: int, inputs: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, zero, scale = _integers(generator, outputs, inputs, 0)
    tensors = {
        "weight_packed": packed(codes),
        "weight_zero_point": packed(zero.t().contiguous()).t().contiguous(),
        "weight_scale": scale,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    return tensors, _value(codes, zero, scale)


def w8a16(generator: torch.Generator, outputs: int, inputs: int) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randint(-128, 128, (outputs, inputs), generator=generator)
    scale = torch.rand(outputs, 1, generator=generator).half() * 0.002 + 0.001
    tensors = {
        "weight_packed": packed(codes + 128, bits=8),
        "weight_scale": scale,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    return tensors, (codes.double() * scale.double()).float()


def fp8(generator: torch.Generator, outputs: int, inputs: int) -> tuple[dict[str, Tensor], Tensor]:
    codes = (torch.randn(outputs, inputs, generator=generator) * 64).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-outputs // 128), -(-inputs // 128), generator=generator) * 0.002 + 0.001
    value = torch.empty(outputs, inputs)
    for row in range(outputs):
        for column in range(inputs):
            value[row, column] = float(codes[row, column]) * float(scale[row // 128, column // 128])
    return {"weight": codes, "weight_scale_inv": scale}, value


def bnb(
    generator: torch.Generator, outputs: int, inputs: int, nested: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """NF4 in blocks of 64, two codes a byte, the first one high; float32, each step rounded."""
    codes = torch.randint(0, 16, (outputs * inputs,), generator=generator)
    blocks = outputs * inputs // 64
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [outputs, inputs]}
    tensors = {"weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": NF4}
    if nested:
        absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        table = torch.linspace(-1, 1, 256)
        shared = torch.rand(-(-blocks // 256), generator=generator) * 0.01
        scale = table[absmax.long()] * shared.repeat_interleave(256)[:blocks] + 0.07
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.07}
        tensors |= {"weight.nested_absmax": shared, "weight.nested_quant_map": table}
    else:
        scale = absmax = torch.rand(blocks, generator=generator) * 0.1
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors |= {"weight.absmax": absmax, "weight.quant_state.bitsandbytes__nf4": text}
    return tensors, (NF4[codes] * scale.repeat_interleave(64)).view(outputs, inputs)


NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
_BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LAYOUTS = {
    "bnb": (bnb, _BITSANDBYTES),
    "bnb_nested": (partial(bnb, nested=True), _BITSANDBYTES),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "w4a16": (w4a16, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "w8a16": (w8a16, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
}


def write_folder(model: Any, folder: Path, layout: str, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of ``model`` whose attention and MLP are random weights in a layout: those weights by name."""
    make, settings = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    model.save_pretrained(folder)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        outputs, inputs = tensors.pop(name).shape
        parts, values[name] = make(generator, outputs, inputs)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": one.clone().contiguous() for part, one in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return values


def _integers(generator: torch.Generator, outputs: int, inputs: int, least: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-inputs // 32)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
    zero = torch.randint(least, 16, (outputs, groups), generator=generator)
    scale = (torch.rand(outputs, groups, generator=generator) * 0.02 + 0.01).half()
    return codes, zero, scale


def _value(codes: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    spread = [part.double().repeat_interleave(32, 1)[:, : codes.shape[1]] for part in (zero, scale)]
    return ((codes.double() - spread[0]) * spread[1]).float()
