"""Evidence from the test suite: under a newer torch, and with mutants of the CUDA kernels."""

import subprocess
import sys
from pathlib import Path

import torch

import fastprune as fp

from . import results
from .experiment import Fact, SkippedError
from .gpu_check import Command, run_command

NEWER_TORCH = "2.13.0"
NEWER_FOLDER = results.ROOT / ".venv-torch213"
NEWER_PACKAGES = ("numpy", "safetensors", "pytest", "hypothesis", "pytest-timeout")


def newer_torch() -> list[Fact]:
    library = Path(fp.__file__).with_name("_cpu.so")
    if not library.exists():
        raise SkippedError("there is no built _cpu.so")
    python = newer_python()
    probe = (
        "import torch, fastprune as fp; i = fp.build_info(); print(torch.__version__, "
        "i.operators['select_threshold']['CPU'])"
    )
    code, said = run_command(Command([python, "-c", probe]), 120)
    version, _, served = (said.strip() or "nothing").splitlines()[-1].partition(" ")
    if code or not version.startswith(NEWER_TORCH) or served != "C++":
        raise AssertionError(f"the library does not load under torch {NEWER_TORCH}")
    code, counts = pytest(python, 900, "-p", "no:cacheprovider", "tests/ops")
    if code != 0:
        raise AssertionError(f"tests/ops under torch {version}: {counts}")
    built = fp.build_info().host.get("built against torch", torch.__version__)
    subject = f"_cpu.so built with torch {built} under torch {version}"
    return [(subject, "tests/ops", counts, "")]


def newer_python() -> str:
    """The interpreter of a second environment, made once and kept."""
    python = NEWER_FOLDER / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", f"torch=={NEWER_TORCH}", *NEWER_PACKAGES]
    if not python.exists():
        print(f"  creating {NEWER_FOLDER.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(NEWER_FOLDER)], check=True)
        (NEWER_FOLDER / ".gitignore").write_text("*\n")
    done = subprocess.run(install, capture_output=True, text=True, timeout=1500)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise SkippedError(f"torch {NEWER_TORCH} cannot be installed here (offline?): {last}")
    return str(python)


def mutants() -> list[Fact]:
    tests = ["-m", "evidence", "tests/csrc/test_simulator.py"]
    code, counts = pytest(sys.executable, 3000, *tests)
    if code != 0:
        raise AssertionError(f"mutants that no sanitizer noticed: {counts}")
    return [("csrc/cuda under ASan, UBSan and TSan", "mutants that fail", counts, "")]


def pytest(python: str, limit: float, *arguments: str) -> tuple[int | None, str]:
    """(exit status, the totals it prints)."""
    code, said = run_command(Command([python, "-m", "pytest", "-q", *arguments]), limit)
    last = (said.strip() or "no output").splitlines()[-1]
    return code, last.strip("= ").split(" in ")[0]
