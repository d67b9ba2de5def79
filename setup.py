"""Builds the optional native CPU library beside the Python packages.

The sources are every ``toolkit/ops/*/cpu.cpp``, compiled as one translation unit (torch's headers are
read once) per instruction set, with headers made from the files of ``toolkit/ops/activation/kinds`` and
``toolkit/ops/attention/modifiers``. The library for the machine at hand is chosen when it is loaded. Without torch
or a C++ compiler at build time nothing is built, and the reference implementations serve.
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
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
    # Only GEMMs use the wider vectors, where the order of additions does not depend on them: the other
    # kernels wait for memory, and so every bit is that of avx2.
    INSTRUCTION_SETS["avx512"] = [*INSTRUCTION_SETS["avx2"], "-mavx512f", "-mavx512dq", "-DTOOLKIT_AVX512"]


def inlined_code(path: Path) -> tuple[str | None, dict[str, int]]:
    """The string ``CPU`` of a Python file and how many arguments its functions take, without importing it."""
    code, functions = None, {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["CPU"]:
            code = ast.literal_eval(node.value)
        elif isinstance(node, ast.FunctionDef):
            functions[node.name] = len(node.args.args)
    return code, functions


def activation_header(folder: Path) -> str:
    """C++ for the activation kinds: the string ``CPU`` of each file of ``folder``."""
    structs, kinds = [], {}
    for path in sorted(folder.glob("[!_]*.py")):
        code, functions = inlined_code(path)
        arguments = functions.get("value")
        if code is None or arguments not in (1, 2):
            raise RuntimeError(f"{path} has no string CPU, or no function value of one or two arguments")
        kinds[path.stem] = arguments
        structs.append(f"struct Kind_{path.stem} {{\n  static constexpr int kArguments = {arguments};\n{code}}};\n")

    def chooser(name: str, chosen: list[str]) -> str:
        lines = "".join(f'  if (kind == "{kind}") return body(Kind_{kind}{{}});\n' for kind in chosen)
        return (
            f"template <typename Body>\ninline void {name}(std::string_view kind, const Body& body) {{\n{lines}"
            '  TORCH_CHECK(false, "activation: kind is \'", std::string(kind), "\'; allowed are '
            f'{", ".join(chosen)}.");\n}}\n'
        )

    plain = [kind for kind, arguments in kinds.items() if arguments == 1]
    choosers = [chooser("with_kind", list(kinds)), chooser("with_plain_kind", plain)]
    return "\n".join(
        ["namespace toolkit::activations {\n", *structs, *choosers, "}  // namespace toolkit::activations\n"]
    )


def modifier_header(folder: Path) -> str:
    """C++ for attention's score and mask functions: the string ``CPU`` of each file of ``folder``."""
    structs, lines, names = [], ["  if (name.empty()) return body(Plain{});\n"], []
    for path in sorted(folder.glob("[!_]*.py")):
        code, functions = inlined_code(path)
        counts = {functions[name] - own for name, own in (("score", 3), ("visible", 2)) if name in functions}
        if code is None or len(counts) != 1:
            raise RuntimeError(f"{path} has no string CPU, or no functions score or visible of the same parameters")
        scores, masks = (str(name in functions).lower() for name in ("score", "visible"))
        structs.append(
            f"struct Modifier_{path.stem} {{\n  static constexpr bool kScores = {scores}, kMasks = {masks};\n"
            f"  static constexpr int64_t kParameters = {counts.pop()};\n{code}}};\n"
        )
        lines.append(f'  if (name == "{path.stem}") return body(Modifier_{path.stem}{{}});\n')
        names.append(path.stem)
    chooser = (
        f"template <typename Body>\ninline void with_modifier(std::string_view name, const Body& body) {{\n"
        f'{"".join(lines)}  TORCH_CHECK(false, "attention: modifier is \'", std::string(name), "\'; allowed are '
        f'{", ".join(names)}.");\n}}\n'
    )
    return "\n".join(
        ["namespace toolkit::attention_op {\n", *structs, chooser, "}  // namespace toolkit::attention_op\n"]
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

    MAX_JOBS limits how many compilers run at a time; each needs about 1 GB. A library that is newer than everything it
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
            raise RuntimeError(result.stderr.strip()[-4000:] or f"compiler exit status {result.returncode}")
        aside.replace(out)
        print(f"toolkit: {name} compiled in {time.monotonic() - started:.0f} s", flush=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


def newest_source() -> float:
    """When what the libraries are made from last changed: sources, headers, this file, torch."""
    import torch

    ops = ROOT / "toolkit" / "ops"
    files = [*ops.rglob("*.cpp"), *ops.rglob("*.h"), *ops.glob("*/kinds/*.py"), *ops.glob("*/modifiers/*.py")]
    return max(path.stat().st_mtime for path in [*files, Path(__file__), Path(torch.version.__file__)])


class Wheel(bdist_wheel):
    """One wheel for every Python: the libraries link torch and not Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"toolkit.ops.native.{name}", sources=[], optional=True) for name in INSTRUCTION_SETS],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
