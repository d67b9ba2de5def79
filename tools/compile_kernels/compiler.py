"""Compiles a launch of a Triton kernel for a target that need not be there, and reads its resources from the binary.

The ops' launchers are called with CPU tensors while the launch is recorded instead of run, so what is compiled is what
would be launched: the same tile, flags and specialisation.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tools.compile_kernels import loops

# Largest dynamic shared memory of a program, bytes.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# Of one multiprocessor: registers, bytes of shared memory and how many a program takes beside its own, warps, programs.
NVIDIA_SM = {"sm_80": (65536, 167936, 1024, 64, 32), "sm_90": (65536, 233472, 1024, 64, 32)}
NVIDIA_SM["sm_100"] = NVIDIA_SM["sm_90"]
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_s?mfma_)")
SIGNATURES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments in order, and the compile options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    kernel: str
    arch: str
    registers: int
    shared: int
    occupancy: float  # warps that are resident at once, of those that the multiprocessor has room for
    spilled: int  # to memory; bytes on NVIDIA, vector registers on AMD
    matrix: dict[str, int]  # matrix instruction -> how often it stands in the assembly
    dots: int  # tl.dot that the kernel's intermediate code holds
    loop: list[int] = field(default_factory=list)  # the inner loop's instructions, and matrix instructions among them


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Record the launches of the body as if tensors were on ``arch``; nothing runs."""
    from triton.runtime.jit import JITFunction

    from toolkit.ops import triton_devices

    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args))
        arguments.update({name: kwargs.pop(name) for name in list(kwargs) if name in self.arg_names})
        launches.append(Launch(self, arguments, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(triton_devices, "architecture", return_value=arch),
    ):
        yield launches


def target_of(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """(types of the parameters, values of the constant ones, what is known of the others) of a recorded launch."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{SIGNATURES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile one recorded launch for ``arch`` and read its resources from the binary."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes = specialised(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target_of(arch), options=launch.options)
    assembly = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    if arch.startswith("gfx"):
        registers = _field(assembly, r"\.vgpr_count:\s+(\d+)")
        spilled = _field(assembly, r"\.vgpr_spill_count:\s+(\d+)")  # scalar spills stay in registers
    else:
        registers, spilled = _nvidia_resources(compiled.asm["cubin"])
    found = MATRIX.findall(assembly)
    loop: loops.Loop | None = None
    if found and arch.startswith("gfx"):
        loop = loops.amd_loop(assembly)
    elif found:
        loop = loops.nvidia_loop(_disassembled(compiled.asm["cubin"], "-sass"))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Compiled(
        launch.kernel.__name__, arch, registers, shared, occupancy(arch, registers, shared, warps), spilled,
        {name: found.count(name) for name in sorted(set(found))}, compiled.asm["ttir"].count("tt.dot "),
        list(loop or ()),
    )  # fmt: skip


def occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warps that programs of this size fill, by registers and shared memory."""
    if arch.startswith("gfx"):  # four SIMDs of 512 registers a lane and 8 waves; 64 KiB of LDS together
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        programs = min(waves // warps, 65536 // shared if shared else waves)
        return programs * warps / 32
    all_registers, all_shared, reserved, all_warps, most = NVIDIA_SM[arch]
    by_registers = all_registers // (-(-max(registers, 1) * 32 // 256) * 256 * warps)
    programs = min(most, all_warps // warps, by_registers, all_shared // (shared + reserved))
    return programs * warps / all_warps


def _field(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}")
    return int(match.group(1))


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory)."""
    report = _disassembled(cubin, "--dump-resource-usage")
    return _field(report, r"REG:(\d+)"), _field(report, r"STACK:(\d+)") + _field(report, r"LOCAL:(\d+)")


def _disassembled(cubin: bytes, option: str) -> str:
    """What the disassembler that Triton's package carries says of a binary."""
    from triton import knobs

    found = Path(knobs.nvidia.cuobjdump.path)
    paths = os.pathsep.join([str(found.parent), os.environ.get("PATH", "")])  # it starts nvdisasm, which lies beside it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command, environment = [str(found), option, str(path)], os.environ | {"PATH": paths}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def compile_case(call: Callable, arch: str) -> list[Compiled]:
    """Compile every launch that ``call`` makes."""
    with recording(arch) as launches:
        call()
    return [compile_launch(launch, arch) for launch in launches]


def faults(made: Compiled) -> list[str]:
    """What makes a compiled kernel unfit to ship."""
    found = []
    if made.spilled:
        found.append(f"spills {made.spilled}")
    if made.shared > SHARED_LIMIT[made.arch]:
        found.append(f"takes {made.shared} bytes of shared memory")
    return found
