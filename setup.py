"""Builds the native libraries; everything else about the package is in pyproject.toml.

FASTPRUNE_BUILD=auto (default) builds what it can and says what it cannot; =cpu insists on the CPU
library and the host module, =cuda on the CUDA library too; =0 installs pure Python.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

os.chdir(Path(__file__).resolve().parent)
MODE = os.environ.get("FASTPRUNE_BUILD", "auto")
LIBRARIES = {"auto": "cpu cuda host", "cuda": "cpu cuda host", "cpu": "cpu host", "0": ""}
if MODE not in LIBRARIES:
    sys.exit(f"FASTPRUNE_BUILD: expected auto, cpu, cuda or 0, got {MODE!r}")
ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 9.0 10.0+PTX"

# No -march: kernels choose their instruction set at run time. CXXFLAGS and the flags Python was
# built with stay out: a -march or -ffast-math in them would change results.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
# GCC 12 calls its own AVX-512 headers uninitialized.
WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CXX_FLAGS = ["-std=c++17", "-O3", *HOST_FLAGS, *WARNINGS]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", *(f"-Xcompiler={flag}" for flag in HOST_FLAGS)]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # loads with every torch from 2.11 on
# An undefined symbol fails here and not at import; a static library's symbols stay inside.
LINK_FLAGS = ["-shared", "-Xlinker", "-zdefs", "-Xlinker", "--exclude-libs=ALL"]
NINJA = """builddir = {folder}
rule compile
  command = {compile} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = {link} -o $out $in {libraries}
  description = link $out
"""


def find_tool(name, *candidates):
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise CompileError(f"no {name} found")


def find_package(name):
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CompileError(f"no {name} found (pip sees it only with --no-build-isolation)")
    return Path(spec.submodule_search_locations[0])


def find_nvcc(torch_cuda):
    """An nvcc of torch's CUDA; it knows its own toolkit, even from behind a wrapper script."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = find_tool("nvcc", ["nvcc"], [f"{home}/bin/nvcc"])
    said = subprocess.run([*nvcc, "--version"], capture_output=True, text=True).stdout
    if not torch_cuda or f"release {torch_cuda.split('.')[0]}." not in said:
        raise CompileError(f"torch was built with CUDA {torch_cuda}, {nvcc[0]} is another")
    return nvcc


def arch_flags():
    for arch in re.split(r"[ ;,]+", ARCHS.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST: expected '8.0 9.0+PTX', got {ARCHS!r}")
        for code in ["sm", "compute"] if match[3] else ["sm"]:
            yield f"-gencode=arch=compute_{match[1]}{match[2]},code={code}_{match[1]}{match[2]}"


def commands(name, cuda_archs):
    """How one library is compiled, how it is linked, and with which libraries."""
    own = shlex.split(os.environ.get("CXX", ""))
    cxx = find_tool("C++ compiler", *([own] if own else [["c++"], ["g++"], ["clang++"]]))
    torch = find_package("torch")
    version = runpy.run_path(str(torch / "version.py"))  # an import of torch takes seconds
    if name == "host":
        headers = [f"{find_package('pybind11')}/include", sysconfig.get_path("include")]
        flags = ["-Icsrc", *(f"-isystem{path}" for path in headers)]
        facts = {"TORCH": version["__version__"], "CUDA_ARCHS": cuda_archs}
        flags += [f'-DFASTPRUNE_BUILT_{key}="{value}"' for key, value in facts.items()]
        flags.append(f'-DFASTPRUNE_BUILT_FLAGS="{shlex.join(CXX_FLAGS)}"')
        return [*cxx, *CXX_FLAGS, *flags], [*cxx, "-shared"], []
    flags = ["-Icsrc", "-isystem", f"{torch}/include", STABLE_ABI]
    libraries = [f"-L{torch}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    if name == "cpu":
        return [*cxx, *CXX_FLAGS, *flags], [*cxx, *LINK_FLAGS], libraries
    # -x=cu: the binding sees the launch header as kernels do. nvcc links its runtime statically.
    nvcc = [*find_nvcc(version["cuda"]), "-DUSE_CUDA", f"-ccbin={cxx[-1]}", *arch_flags()]
    return [*nvcc, "-x=cu", *NVCC_FLAGS, *flags], [*nvcc, *LINK_FLAGS], [*libraries, "-ltorch_cuda"]


class BuildNative(build_ext):
    """Lets ninja compile what changed, headers included."""

    def get_ext_filename(self, name):
        # torch.ops.load_library opens the operator libraries; they are no Python modules.
        operators = name.endswith(("_cpu", "_cuda"))
        return name.replace(".", "/") + ".so" if operators else super().get_ext_filename(name)

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name))
        try:
            self.run_ninja(extension, target)
        except CompileError:  # a warning where the extension is optional, else the end
            target.unlink(missing_ok=True)  # an older build must not pass for this one
            Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)
            raise

    def run_ninja(self, extension, target):
        ninja = find_tool("ninja", [str(Path(sys.executable).with_name("ninja"))], ["ninja"])
        archs = ARCHS if Path(self.get_ext_fullpath("fastprune._cuda")).exists() else "none"
        compile_, link, libraries = map(shlex.join, commands(extension.name.split("_")[1], archs))
        folder = Path(self.build_temp, extension.name)
        text = NINJA.format(folder=folder, compile=compile_, link=link, libraries=libraries)
        objects = [f"{folder}/{source}.o" for source in extension.sources]
        for source, built in zip(extension.sources, objects, strict=True):
            text += f"build {built}: compile {source}\n"
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "build.ninja"
        script.write_text(f"{text}build {target}: link {' '.join(objects)}\n")
        if subprocess.run([*ninja, "-f", str(script)]).returncode:
            raise CompileError("ninja failed, its messages are above")


def extensions():
    depends = sorted(map(str, Path("csrc").rglob("*.*")))  # what a source distribution carries
    for name in LIBRARIES[MODE].split():
        bindings = Path("csrc/bindings").glob("host.cpp" if name == "host" else f"{name}_*.cpp")
        kernels = Path("csrc", name).rglob("*.cpp" if name == "cpu" else "*.cu")
        sources = [*sorted(map(str, bindings)), *sorted(map(str, kernels))]
        optional = MODE == "auto"
        yield Extension(f"fastprune._{name}", sources, depends=depends, optional=optional)


setup(ext_modules=list(extensions()), cmdclass={"build_ext": BuildNative})
