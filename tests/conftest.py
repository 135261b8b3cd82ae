"""What every test may use: devices, poisoned memory, a thread count that is put back."""

from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is each device that is there; tests for one that is not are not shown as skipped."""
    if "device" in metafunc.fixturenames:
        marks = {"cpu": [], "cuda": [pytest.mark.gpu]}
        devices = [pytest.param(torch.device(name), id=name, marks=marks[name]) for name in DEVICES]
        metafunc.parametrize("device", devices)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, True or the largest integer, so an unwritten output is seen."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was_filling
    torch.use_deterministic_algorithms(was_on)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
