"""The package installs with and without a compiler, and its libraries depend only on torch."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES = ["_cpu", "_cuda"]
TOY = """
#include "cpu/toy.h"
extern "C" __attribute__((visibility("default"))) int fastprune_toy() { return kToy; }
"""

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a source distribution carries, without anything built."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "fastprune"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


@pytest.fixture
def toy_checkout(checkout: Path) -> Path:
    """The same with one operator library of a single small file, which compiles at once."""
    shutil.rmtree(checkout / "csrc")
    (checkout / "csrc/bindings").mkdir(parents=True)
    (checkout / "csrc/cpu").mkdir()
    (checkout / "csrc/bindings/cpu_ops.cpp").write_text(TOY)
    (checkout / "csrc/cpu/toy.h").write_text("constexpr int kToy = 1;\n")
    return checkout


def without_compiler(tmp_path: Path) -> dict[str, str]:
    empty = tmp_path / "bin"
    empty.mkdir()
    return {"PATH": str(empty), "CXX": str(empty / "c++"), "CUDA_HOME": str(empty)}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    outer = {k: v for k, v in os.environ.items() if not k.startswith("FASTPRUNE_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**outer, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **environment)


def install_and_describe(checkout: Path, **environment: str) -> str:
    """Installs a checkout into an empty folder; what the package there says about itself."""
    pytest.importorskip("pip")
    target = checkout.parent / "site"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "--target", str(target)]
    installed = run("-m", "pip", "install", *options, checkout, cwd=checkout, **environment)
    assert installed.returncode == 0, installed.stdout
    assert not list(target.rglob("*.so"))
    assert (target / "fastprune/py.typed").exists()
    script = (
        "import fastprune as fp, torch\n"
        "print(fp.__file__, fp.build_info().reference_only)\n"
        "print(fp.global_topk_masks([torch.tensor([1., 3., 2.])], 2))\n"
        "print(fp.build_info())\n"
    )
    said = run("-c", script, cwd=checkout.parent, PYTHONPATH=str(target))
    assert said.returncode == 0, said.stdout
    assert f"{target / 'fastprune/__init__.py'} True\n" in said.stdout
    assert "[tensor([False,  True,  True])]" in said.stdout
    return said.stdout


def test_pure_python_install_runs_on_the_reference(checkout: Path) -> None:
    assert "reference" in install_and_describe(checkout, FASTPRUNE_BUILD="0")


def test_install_without_a_compiler_runs_on_the_reference(checkout: Path, tmp_path: Path) -> None:
    assert "reference" in install_and_describe(checkout, **without_compiler(tmp_path))


def test_a_build_without_a_compiler_says_so(checkout: Path, tmp_path: Path) -> None:
    environment = without_compiler(tmp_path)
    forgiving = build(checkout, **environment)
    assert forgiving.returncode == 0, forgiving.stdout
    assert '"fastprune._cpu" failed: no C++ compiler found' in forgiving.stdout
    for mode in ("cpu", "cuda"):
        strict = build(checkout, FASTPRUNE_BUILD=mode, **environment)
        assert strict.returncode != 0
        assert "no C++ compiler found" in strict.stdout


@needs_compiler
def test_a_kernel_that_does_not_compile_is_left_out(toy_checkout: Path) -> None:
    (toy_checkout / "csrc/cpu/broken.cpp").write_text("#error planted\n")
    stale = toy_checkout / "fastprune/_cpu.so"
    stale.write_text("of an older build")
    forgiving = build(toy_checkout)
    assert forgiving.returncode == 0, forgiving.stdout
    assert "#error planted" in forgiving.stdout
    assert 'building extension "fastprune._cpu" failed' in forgiving.stdout
    assert not stale.exists()
    strict = build(toy_checkout, FASTPRUNE_BUILD="cpu")
    assert strict.returncode != 0
    assert "#error planted" in strict.stdout


@needs_compiler
def test_only_what_changed_is_compiled(toy_checkout: Path) -> None:
    source = toy_checkout / "csrc/cpu/other.cpp"
    source.write_text('extern "C" int fastprune_other() { return 0; }\n')
    first = build(toy_checkout).stdout
    assert "compile csrc/cpu/other.cpp" in first
    assert (toy_checkout / "fastprune/_cpu.so").exists()
    assert "no work to do" in build(toy_checkout).stdout

    (toy_checkout / "csrc/cpu/toy.h").write_text("constexpr int kToy = 2;\n")
    after_header = build(toy_checkout).stdout
    assert "compile csrc/bindings/cpu_ops.cpp" in after_header
    assert "compile csrc/cpu/other.cpp" not in after_header

    source.unlink()
    after_removal = build(toy_checkout).stdout
    assert "link" in after_removal
    assert "compile" not in after_removal


def test_a_wrong_build_mode_is_refused(checkout: Path) -> None:
    refused = build(checkout, FASTPRUNE_BUILD="gpu")
    assert refused.returncode != 0
    assert "FASTPRUNE_BUILD: expected auto, cpu, cuda or 0, got 'gpu'" in refused.stdout


@needs_compiler
def test_a_wrong_arch_list_is_refused(toy_checkout: Path) -> None:
    built = build(toy_checkout, TORCH_CUDA_ARCH_LIST="Hopper").stdout
    if "no nvcc found" in built or "torch was built with CUDA" in built:
        pytest.skip("no nvcc of torch's CUDA")
    assert "TORCH_CUDA_ARCH_LIST: expected '8.0 9.0+PTX', got 'Hopper'" in built


def binutil(tool: str, option: str, library: str) -> str:
    path = ROOT / f"fastprune/{library}.so"
    if not path.exists():
        pytest.skip(f"{path.name} is not built")
    if not shutil.which(tool):
        pytest.skip(f"no {tool}")
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("library", LIBRARIES)
def test_operator_libraries_are_free_of_python(library: str) -> None:
    symbols = re.findall(r" U (\S+)", binutil("nm", "-D", library))
    assert symbols
    assert [name for name in symbols if name.startswith(("Py", "_Py"))] == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_operator_libraries_need_only_torch_and_the_system(library: str) -> None:
    dynamic = binutil("readelf", "-d", library)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    allowed = {"libtorch.so", "libtorch_cpu.so", "libc10.so", "libstdc++.so.6", "libgcc_s.so.1"}
    allowed |= {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
    if library == "_cuda":
        allowed |= {"libtorch_cuda.so"}  # no libcudart: it is linked statically
    assert {name for name in needed if not name.startswith("ld-linux")} <= allowed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def host(expression: str, **environment: str) -> str:
    """An expression of `_host` in a process of its own, without torch."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = ROOT / f"fastprune/_host{suffix}"
    if not path.exists():
        pytest.skip(f"{path.name} is not built")
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_host', {str(path)!r})\n"
        "host = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(host)\n"
        "assert 'torch' not in sys.modules\n"
        f"print({expression})\n"
    )
    return run("-c", script, cwd=ROOT, **environment).stdout.strip()


def test_the_instruction_set_can_be_lowered_but_not_raised() -> None:
    best = host("host.best_isa()")
    assert host("host.cpu_features()[host.best_isa()]") == "True"
    order = ["baseline", "avx2", "avx512"]
    for wanted in order:
        lower = order[min(order.index(wanted), order.index(best))]
        assert host("host.best_isa()", FASTPRUNE_ISA=wanted) == lower
    refused = host("host.best_isa()", FASTPRUNE_ISA="sse")
    assert "FASTPRUNE_ISA: expected baseline, avx2 or avx512, got 'sse'" in refused


def test_the_build_describes_itself() -> None:
    built = host("host.build_info()")
    assert "-ffp-contract=off" in built
    assert "-march" not in built
    assert "'built against torch': '2." in built
