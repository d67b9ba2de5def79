"""Builds the optional native CPU library beside the Python packages.

The sources are every ``toolkit/ops/*/cpu.cpp``, compiled as one translation unit (torch's headers are
read once) per instruction set, with headers made from the files of ``toolkit/ops/activation/kinds``,
``toolkit/ops/attention/modifiers`` and ``toolkit/ops/quantised_linear/formats``. The library for the machine at hand
is chosen when it is loaded. Without torch or a C++ compiler at build time nothing is built, and the reference
implementations serve.
"""

import ast
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
# -ffp-contract=off: a fused multiply-add happens where the source says fmadd and nowhere else.
COMMON = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-w"]
INSTRUCTION_SETS = {
    "baseline": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
}
if X86:
    # For processors without AVX2: before 2013, and some virtual machines.
    INSTRUCTION_SETS["baseline"].append("-O2")
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
    # Only GEMMs use the wider vectors, where the order of additions does not depend on them: the other
    # kernels wait for memory, and so every bit is that of avx2.
    INSTRUCTION_SETS["avx512"] = [*INSTRUCTION_SETS["avx2"], "-mavx512f", "-mavx512dq", "-DTOOLKIT_AVX512"]


def arguments_of(path: Path) -> dict[str, int]:
    """How many arguments each function of a Python file takes, without importing it."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {function.name: len(function.args.args) for function in functions}


def functor_header(path: Path) -> Path:
    """The C++ header that stands beside a Python file; RuntimeError where there is none."""
    header = path.with_suffix(".h")
    if not header.exists():
        raise RuntimeError(f"{path.name} has no C++ functor beside it; write {header}")
    return header.resolve()


def chooser(name: str, argument: str, structs: dict[str, str], empty: str, op: str) -> str:
    """A C++ function that calls ``body`` with the functor that ``argument`` names."""
    lines = "".join(f'  if ({argument} == "{key}") return body({struct}{{}});\n' for key, struct in structs.items())
    return (
        f"template <typename Body>\ninline void {name}(std::string_view {argument}, const Body& body) {{\n"
        f"{empty}{lines}"
        f'  TORCH_CHECK(false, "{op}: {argument} must be one of {", ".join(structs)}, got \'", '
        f'std::string({argument}), "\'.");\n}}\n'
    )


def activation_header(folder: Path) -> str:
    """C++ that includes the functor of every file of ``folder`` and chooses among them by name."""
    includes, checks, structs, plain = [], [], {}, {}
    for path in sorted(folder.glob("[!_]*.py")):
        arguments = arguments_of(path).get("value")
        if arguments not in (1, 2):
            raise RuntimeError(f"{path.name} must have a function value of one or two arguments")
        includes.append(f'#include "{functor_header(path)}"\n')
        struct = structs[path.stem] = f"Kind_{path.stem}"
        checks.append(
            f'static_assert({struct}::kArguments == {arguments}, "{path.stem}.h and {path.name} disagree");\n'
        )
        if arguments == 1:
            plain[path.stem] = struct
    choosers = [
        chooser(*one, "", "activation") for one in (("with_kind", "kind", structs), ("with_plain_kind", "kind", plain))
    ]
    return _header("activations", "activations.h", includes, [*checks, *choosers])


def modifier_header(folder: Path) -> str:
    """C++ that includes the score and mask functions of every file of ``folder`` and chooses among them by name."""
    includes, checks, structs = [], [], {}
    for path in sorted(folder.glob("[!_]*.py")):
        functions = arguments_of(path)
        counts = {functions[name] - own for name, own in (("score", 3), ("visible", 2)) if name in functions}
        if len(counts) != 1:
            raise RuntimeError(f"{path.name} must have functions score or visible of the same parameters")
        includes.append(f'#include "{functor_header(path)}"\n')
        struct = structs[path.stem] = f"Modifier_{path.stem}"
        scores, masks = (str(name in functions).lower() for name in ("score", "visible"))
        checks.append(
            f"static_assert({struct}::kScores == {scores} && {struct}::kMasks == {masks} && "
            f'{struct}::kParameters == {counts.pop()}, "{path.stem}.h and {path.name} disagree");\n'
        )
    empty = "  if (modifier.empty()) return body(Plain{});\n"
    chosen = chooser("with_modifier", "modifier", structs, empty, "attention")
    return _header("attention_op", None, includes, [*checks, chosen])


def format_header(folder: Path) -> str:
    """C++ that includes the functor of every weight format of ``folder`` and chooses among them by name."""
    paths = sorted(folder.glob("[!_]*.py"))
    includes = [f'#include "{functor_header(path)}"\n' for path in paths]
    structs = {path.stem: f"Format_{path.stem}" for path in paths}
    return _header("quantised", None, includes, [chooser("with_format", "format", structs, "", "quantised_linear")])


def _header(namespace: str, needs: str | None, includes: list[str], body: list[str]) -> str:
    first = [f'#include "{needs}"\n'] if needs else []
    inside = "\n".join(body)
    return "".join(
        [
            "#pragma once\n",
            *first,
            *includes,
            f"\nnamespace toolkit::{namespace} {{\n\n{inside}\n}}  // namespace toolkit::{namespace}\n",
        ]
    )


def compile_command(name: str, sources: list[Path], out: Path, work: Path) -> list[str]:
    """The compiler call that turns ``sources`` into the shared library ``out`` for one instruction set."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    work.mkdir(parents=True, exist_ok=True)
    unit = work / f"native_{name}.cpp"
    unit.write_text("".join(f'#include "{source.resolve()}"\n' for source in sources))
    generated = work / f"generated_{name}"
    generated.mkdir(exist_ok=True)
    kinds = ROOT / "toolkit" / "ops" / "activation" / "kinds"
    (generated / "activation_kinds.h").write_text(activation_header(kinds))
    modifiers = ROOT / "toolkit" / "ops" / "attention" / "modifiers"
    (generated / "attention_modifiers.h").write_text(modifier_header(modifiers))
    formats = ROOT / "toolkit" / "ops" / "quantised_linear" / "formats"
    (generated / "quantised_formats.h").write_text(format_header(formats))
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler found")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = [f"-I{path}" for path in include_paths()] + [
        f"-I{ROOT / 'toolkit' / 'ops' / 'native'}",
        f"-I{generated}",
    ]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
    return [
        compiler,
        *COMMON,
        abi,
        *INSTRUCTION_SETS[name],
        *includes,
        str(unit),
        "-shared",
        "-o",
        str(out),
        *libraries,
    ]


class BuildNative(build_ext):
    """Compiles one library per instruction set, side by side; a failure is one line, not an error.

    MAX_JOBS limits how many compilers run at a time; each needs 1.6 GB. A library that is newer than everything it
    is made from is kept.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        root = ROOT if self.inplace else Path(self.build_lib)
        outputs = {e.name.rsplit(".", 1)[1]: root / self.get_ext_filename(e.name) for e in self.extensions}
        try:
            self.compile_stale(outputs)
        except Exception as error:
            print(
                f"toolkit: the native CPU kernels were not built ({error}); the reference implementations run instead",
                file=sys.stderr,
                flush=True,
            )

    def compile_stale(self, outputs: dict[str, Path]) -> None:
        """Compile what is older than its sources."""
        changed = newest_source()
        stale = {
            name: out
            for name, out in outputs.items()
            if self.force or not out.exists() or out.stat().st_mtime < changed
        }
        if not stale:
            print("toolkit: the native CPU kernels are up to date", flush=True)
            return
        jobs = max(1, min(len(stale), int(os.environ.get("MAX_JOBS", len(stale)))))
        print(f"toolkit: compiling the native CPU kernels for {', '.join(stale)}, {jobs} at a time", flush=True)
        started = time.monotonic()
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self.compile_one, stale, stale.values()))
        print(f"toolkit: compiled the native CPU kernels in {time.monotonic() - started:.0f} s", flush=True)

    def compile_one(self, name: str, out: Path) -> None:
        """Compile one instruction set aside and move it into place."""
        started = time.monotonic()
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_suffix(".so.new")
        sources = sorted(ROOT.glob("toolkit/ops/*/cpu.cpp"))
        command = compile_command(name, sources, aside, Path(self.build_temp))
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if result.returncode != 0:
            print(result.stderr, file=sys.stderr, flush=True)
            lines = result.stderr.strip().splitlines() or [f"compiler exit status {result.returncode}"]
            raise RuntimeError(f"{name}: {next((line for line in lines if 'error' in line), lines[-1])}")
        aside.replace(out)
        print(f"toolkit: {name} compiled in {time.monotonic() - started:.0f} s", flush=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


def newest_source() -> float:
    """When what the libraries are made from last changed: sources, headers, this file, torch."""
    import torch

    ops = ROOT / "toolkit" / "ops"
    files = [*ops.rglob("*.cpp"), *ops.rglob("*.h"), *ops.glob("*/kinds/*.py"), *ops.glob("*/modifiers/*.py")]
    files += ops.glob("*/formats/*.py")
    return max(path.stat().st_mtime for path in [*files, Path(__file__), Path(torch.version.__file__)])


class Wheel(bdist_wheel):
    """One wheel for every Python: the libraries link torch and not Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"toolkit.ops.native.{name}", sources=[], optional=True) for name in INSTRUCTION_SETS],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
