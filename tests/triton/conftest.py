"""Where Triton kernels run: in the interpreter on the CPU, or compiled on a GPU.

Triton decides when it is imported, so each way needs a process of its own: `test_*_triton.py` runs
kernels, the other files compile them. This folder is no package, since one of its name could be
found in place of Triton.
"""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS = {
    "triton_device": "no GPU for Triton kernels here; `TRITON_INTERPRET=1 pytest tests/triton`",
    "compiler": "the interpreter replaced the compiler in this process",
}
HERE = {
    "triton_device": INTERPRETED or torch.cuda.is_available(),
    "compiler": not INTERPRETED,
}


@pytest.hookimpl(hookwrapper=True)
def pytest_pycollect_makemodule(module_path: os.PathLike[str]) -> Iterator[None]:
    """Files for the other process are one skip with its reason, not one for each test."""
    outcome = yield
    need = "triton_device" if str(module_path).endswith("_triton.py") else "compiler"
    if not HERE[need]:
        outcome.get_result().collect = lambda: pytest.skip(NEEDS[need])


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The device on which Triton kernels run in this process."""
    return torch.device("cpu" if INTERPRETED else "cuda")
