"""The CPU kernels of sparse regions: sanitizers, instruction sets, generated code, memory."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprune as fp
from fastprune.ops import reference
from fastprune.ops.reference.sparse import Kernel, Kind, Step

from .sparse_cases import KEYS, Convolution, convolutions, convolve, packed, program

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *sorted(ROOT.glob("csrc/cpu/sparse_conv/*.cpp")),
    ROOT / "tests/csrc/sparse_conv_driver.cpp",
]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
SANITIZED = [
    *("-std=c++17", "-g", "-O1", "-ffp-contract=off"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]
OPERATORS = torch.ops.fastprune
HAS_NATIVE = fp.build_info().operators["sparse_network"]["CPU"] != "reference"
MAPS = Path("/proc/self/maps")

native = pytest.mark.skipif(not HAS_NATIVE, reason="no native library")
on_linux = pytest.mark.skipif(not MAPS.exists(), reason="reads the process's memory map")


def release(key: int) -> None:
    OPERATORS.sparse_release(torch.empty(0), key)


def sparse_weight(outputs: int, inputs: int, size: int, kept: float) -> Tensor:
    generator = torch.Generator().manual_seed(outputs * inputs + size)
    weight = torch.randn(outputs, inputs, size, size, generator=generator)
    return weight * (torch.rand(weight.shape, generator=generator) < kept)


def one_convolution(kernel: Kernel) -> tuple[list[Tensor], list[int]]:
    weights = packed(sparse_weight(40, 16, 3, 0.2), torch.randn(40))
    step = Step(Kind.CONV, 1, 0, -1, 0, 3, 3, 1, 1, 1, 1, kernel=kernel)
    return weights, program(step, Step(Kind.OUTPUT, first=1))


@pytest.fixture(scope="session")
def sanitized_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(COMPILER[0]):
        pytest.skip("needs a C++ compiler (g++ or CXX)")
    folder = tmp_path_factory.mktemp("sparse_conv")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run([*COMPILER, *SANITIZED, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as workers:
        objects = list(workers.map(compiled, SOURCES))
    run([*COMPILER, *SANITIZED, *objects, "-o", folder / "driver"])
    return folder / "driver"


def run(command: list[Any], **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_random_convolutions_and_bad_programs_under_the_sanitizers(sanitized_driver: Path) -> None:
    """On every instruction set of this machine, against a plain loop in double."""
    run([sanitized_driver, 500, 3])


def long_convolutions() -> list[Convolution]:
    """More inputs than the first cache holds: rows go panel by panel."""
    sizes = [(512, 70, 14, 1, 0.9), (300, 33, 9, 3, 0.7), (256, 40, 14, 3, 0.95)]
    return [
        Convolution(
            2, inputs, outputs, size, size, (kernel, kernel), (stride, stride),
            (kernel // 2, kernel // 2), (1, 1), 1, sparsity, blocks, activation, residual, False, 1,
        )
        for inputs, outputs, size, kernel, sparsity in sizes
        for stride in (1, 2)
        for blocks, activation, residual in [(1, 1, True), (4, 4, True), (1, 0, False)]
    ]  # fmt: skip


def check_random_convolutions(number: int = 60) -> None:
    for case in [*islice(convolutions(number, seed=5), number), *long_convolutions()]:
        got, expected, sizes = convolve(case, Kernel.AUTOMATIC, OPERATORS.sparse_network)
        assert ((got.double() - expected).abs() <= 1e-5 * sizes).all(), case


@native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_pytorch(isa: str) -> None:
    """In a process of its own, since the choice is made once."""
    code = f"from {__name__} import *; check_random_convolutions()"
    run([sys.executable, "-c", code], FASTPRUNE_ISA=isa, OMP_NUM_THREADS="1")


def check_generated_where_refused() -> None:
    weights, code = one_convolution(Kernel.GENERATED)
    x = torch.randn(2, 16, 23, 31)
    (expected,) = reference.sparse_network([x], weights, code, 0)  # its kernels are generated too
    set_mdwe, refuse_exec_gain = 65, 1  # of Linux 6.3: no page becomes executable from now on
    if ctypes.CDLL(None).prctl(set_mdwe, refuse_exec_gain, 0, 0, 0) != 0:
        print("not supported")
        return
    (got,) = OPERATORS.sparse_network([x], weights, code, next(KEYS))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@native
@on_linux
def test_rows_where_executable_pages_are_refused() -> None:
    """In a process of its own, since this cannot be taken back."""
    code = f"from {__name__} import *; check_generated_where_refused()"
    if "not supported" in run([sys.executable, "-c", code]):
        pytest.skip("this kernel cannot refuse executable pages")


def anonymous_code() -> set[tuple[str, str]]:
    """Addresses and rights of executable memory that belongs to no file."""
    maps = [line.split() for line in MAPS.read_text().splitlines()]
    return {(fields[0], fields[1]) for fields in maps if "x" in fields[1] and len(fields) == 5}


@native
@on_linux
def test_generated_code_is_never_writable_and_goes_with_its_key() -> None:
    weights, code = one_convolution(Kernel.GENERATED)
    before, key = anonymous_code(), next(KEYS)
    OPERATORS.sparse_network([torch.randn(1, 16, 20, 20)], weights, code, key)
    made = anonymous_code() - before
    assert all(rights == "r-xp" for _, rights in made)
    assert len(made) == (torch.backends.cpu.get_cpu_capability() == "AVX512")
    release(key)
    assert not made & anonymous_code()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(call: Callable[[int], object], number: int) -> int:
    """Bytes the process gains by calls after the first ones."""
    for i in range(number // 4):
        call(i)
    before = resident_bytes()
    for i in range(number):
        call(i)
    return resident_bytes() - before


@native
@on_linux
def test_memory_does_not_grow_with_calls_sizes_or_keys() -> None:
    weights, code = one_convolution(Kernel.AUTOMATIC)
    images = [torch.randn(1, 16, 40 + i, 44) for i in range(40)]
    key = next(KEYS)

    def with_another_key(i: int) -> None:
        OPERATORS.sparse_network([images[0]], weights, code, other := next(KEYS))
        release(other)

    assert grown(lambda i: OPERATORS.sparse_network([images[0]], weights, code, key), 10000) < 1e6
    assert (
        grown(lambda i: OPERATORS.sparse_network([images[i % 40]], weights, code, key), 400) < 2e7
    )
    assert grown(with_another_key, 400) < 2e7
    release(key)


@native
def test_calls_at_once_do_not_disturb_each_other() -> None:
    weights, code = one_convolution(Kernel.AUTOMATIC)
    images = [torch.randn(1 + i % 3, 16, 20, 24) for i in range(40)]
    key = next(KEYS)
    with ThreadPoolExecutor(4) as threads:
        got = list(
            threads.map(lambda x: OPERATORS.sparse_network([x], weights, code, key)[0], images)
        )
    for x, y in zip(images, got, strict=True):
        (expected,) = reference.sparse_network([x], weights, code, 0)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    release(key)


def refused(message: str, inputs: list[Tensor], weights: list[Tensor], code: list[int]) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPERATORS.sparse_network(inputs, weights, code, next(KEYS))


@native
def test_bad_arguments_are_refused_with_a_reason() -> None:
    weights, code = one_convolution(Kernel.AUTOMATIC)
    x = torch.randn(1, 16, 8, 8)
    refused("step 0: the input has too few channels", [x[:, :3].contiguous()], weights, code)
    refused(r"inputs\[0\] must be a float32 tensor", [x.double()], weights, code)
    refused(r"inputs\[0\] must be \[N, C, H, W\]", [x[0]], weights, code)
    refused("must be float32 or int32", [x], [weights[0].half(), *weights[1:]], code)
    refused("must be int32", [x], [weights[0], weights[1].float(), *weights[2:]], code)
    refused("numbers per step", [x], weights, code[:-1])
    refused("step 1: kind must be 0 to 9, got 17", [x], weights, [*code[:18], 17, *code[19:]])
    key = next(KEYS)
    with pytest.raises(ValueError, match="belongs to another network"):
        OPERATORS.sparse_network([x], weights, code, key)
        OPERATORS.sparse_network([x], weights, [*code, *code[18:]], key)
    release(key)
