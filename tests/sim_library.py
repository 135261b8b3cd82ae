"""The CUDA operators in the host simulator: the same kernels and binding, on CPU tensors.

`simulated_operators(folder)` builds the library with the C++ compiler, defines the operators in
the namespace `fastprune_sim`, and returns that namespace.
"""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastprune.ops.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "fastprune_sim"
SOURCES = sorted([*ROOT.glob("csrc/bindings/cuda_*.cpp"), *ROOT.glob("csrc/cuda/*.cu")])
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
HAS_COMPILER = shutil.which(COMPILER[0]) is not None
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-DFASTPRUNE_SIM"]
COUNTER = ROOT / "tests/csrc/count_elements.h"  # before all else of each source
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
TORCH = Path(torch.__file__).parent


@cache
def simulated_operators(folder: Path) -> Any:
    """`torch.ops.fastprune_sim`, after a build into `folder`; once per process."""
    library = build(folder)
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, NAMESPACE)


def build(folder: Path) -> Path:
    """Compiles the sources two at a time and links them."""
    headers = [f"-I{ROOT / 'csrc'}", f"-isystem{TORCH / 'include'}"]
    objects = [folder / f"{source.name}.o" for source in SOURCES]
    compile_ = [*COMPILER, *FLAGS, STABLE_ABI, *headers, "-include", COUNTER, "-c"]
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(lambda s, o: _run([*compile_, s, "-o", o]), SOURCES, objects))
    library = folder / f"{NAMESPACE}.so"
    torch_libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*COMPILER, "-shared", *objects, "-o", library, *torch_libraries])
    return library


def _run(command: list[Any]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
