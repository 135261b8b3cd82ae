"""What limits an operator that is bound by memory: a pass that only reads (CPU), a copy (CUDA)."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("read_floor.cpp")
# Those of setup.py: no -march, the instruction set is chosen at run time.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
ISAS = ("baseline", "avx2", "avx512")


@functools.cache
def _compiled() -> Any | None:
    """read_floor of a library built for this process; None without a C++ compiler."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    commands = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    compiler = next((c for c in commands if shutil.which(c[0])), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="fastprune-bench-") as folder:
        library = Path(folder) / "read_floor.so"
        subprocess.run(
            [*compiler, *FLAGS, "-shared", "-pthread", "-o", str(library), str(SOURCE)], check=True
        )
        function = ctypes.CDLL(str(library)).read_floor  # stays loaded when the file is gone
    pointers, sizes = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t)
    function.argtypes = [pointers, sizes, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    function.restype = ctypes.c_uint64
    return function


def read_pass(
    tensors: Sequence[Tensor], threads: int | None = None, isa: str = "avx512"
) -> Callable[[], int] | None:
    """A call that reads all bytes of dense CPU tensors once, with torch's number of threads.

    None where there is no C++ compiler. The result is the sum of each tensor's 64-bit words.
    """
    function = _compiled()
    if function is None:
        return None
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_size_t * len(tensors))(*(t.nbytes for t in tensors))
    keep = list(tensors)  # the addresses are only good while the tensors live

    def run() -> int:
        count = threads or torch.get_num_threads()
        return int(function(pointers, sizes, len(keep), count, ISAS.index(isa)))

    return run


def copy_pass(total_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A device copy that moves `total_bytes`, half of them read and half written."""
    source = torch.zeros(max(total_bytes // 2, 1), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def sum_pass(total_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """Torch's reduction of one float tensor of `total_bytes`: a pass that only reads."""
    source = torch.empty(max(total_bytes // 4, 1), device=device).uniform_()
    return source.sum
