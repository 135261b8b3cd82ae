"""The simulator's operators, built once for all files that run CUDA kernels on the host."""

from typing import Any

import pytest

from tests.sim_library import simulated_operators


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return simulated_operators(tmp_path_factory.mktemp("simulator"))
