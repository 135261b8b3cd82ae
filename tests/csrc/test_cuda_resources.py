"""Compiles every CUDA kernel for GPUs that need not be there, and guards what it costs.

    python tests/csrc/test_cuda_resources.py

writes the table anew. Look at the differences before you commit them: registers and shared memory
bound how many blocks share a multiprocessor, and a spill is traffic that no count of bytes has in
it.
"""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TABLE = Path(__file__).with_name("cuda_resources.json")
ARCHITECTURES = (80, 90, 100)
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-cubin", "-Xptxas=-v"]  # -O3 as the build has it
SPARE_REGISTERS = 4  # assemblers of one CUDA release differ by as much

_FOLDERS = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
NVCC = shutil.which("nvcc") or next(
    (f"{f}/bin/nvcc" for f in _FOLDERS if f and Path(f, "bin/nvcc").exists()), None
)
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<spill>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)

# kernel -> architecture -> [registers, spilled bytes, static shared bytes]
Resources = dict[str, dict[str, list[int]]]


def nvcc_release() -> str:
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def measure(source: Path, architecture: int, folder: Path) -> dict[str, list[int]]:
    """The cost of each kernel of a file, as the assembler reports it."""
    output = folder / f"{source.stem}.{architecture}.cubin"
    command = [NVCC, *FLAGS, f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}", source, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    costs = {}
    for kernel in _KERNEL.finditer(done.stderr):
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        costs[readable(kernel["name"])] = [
            int(kernel["registers"]),
            int(kernel["spill"]),
            int(shared[1]) if shared else 0,
        ]
    return costs


def readable(mangled: str) -> str:
    """`count_digit<2, unsigned int, true>` of the mangled name of a kernel."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = name.replace("fastprune::", "").replace("(ScoreKind)", "")
    return name.partition("(")[0].strip()


def measure_all(folder: Path) -> Resources:
    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as workers:
        costs = list(workers.map(lambda job: measure(*job, folder), jobs))
    table: Resources = {}
    for (source, architecture), kernels in zip(jobs, costs, strict=True):
        for kernel, cost in kernels.items():
            table.setdefault(f"{source.name}: {kernel}", {})[str(architecture)] = cost
    return dict(sorted(table.items()))


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    if NVCC is None:
        pytest.skip("needs nvcc (CUDA toolkit)")
    return measure_all(tmp_path_factory.mktemp("cubins"))


def test_no_kernel_spills(measured: Resources) -> None:
    spilling = {
        f"{kernel} on sm_{architecture}": cost[1]
        for kernel, costs in measured.items()
        for architecture, cost in costs.items()
        if cost[1]
    }
    assert measured
    assert not spilling


def test_resources_are_those_of_the_table(measured: Resources) -> None:
    table = json.loads(TABLE.read_text())
    expected = table["kernels"]
    assert measured.keys() == expected.keys(), "a kernel came or went: write the table anew"
    if table["nvcc"] != nvcc_release():
        pytest.skip(f"the table is of nvcc {table['nvcc']}, this is {nvcc_release()}")
    for kernel, costs in measured.items():
        assert costs.keys() == expected[kernel].keys(), kernel
        for architecture, (registers, _, shared) in costs.items():
            was_registers, _, was_shared = expected[kernel][architecture]
            place = f"{kernel} on sm_{architecture}"
            assert abs(registers - was_registers) <= SPARE_REGISTERS, place
            assert shared == was_shared, place


def write_table() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        kernels = measure_all(Path(folder))
    lines = [f"    {json.dumps(kernel)}: {json.dumps(cost)}" for kernel, cost in kernels.items()]
    head = f'{{\n  "nvcc": "{nvcc_release()}",\n  "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n  }\n}\n")


if __name__ == "__main__":
    write_table()
