"""The CUDA kernels of the Dirichlet operators, run in the host simulator."""

from typing import Any

import pytest
import torch

import fastprune as fp
from tests.ops.dirichlet_cases import CASES, Case
from tests.ops.machine import assert_same
from tests.sim_library import HAS_COMPILER

pytestmark = [
    pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler (g++ or CXX)"),
    pytest.mark.skipif(
        fp.build_info().operators["dirichlet_kl"]["CPU"] == "reference", reason="no native library"
    ),
]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_cpu(case: Case, simulator: Any, poisoned_memory: None) -> None:
    assert_same(case.results(simulator), case.results(torch.ops.fastprune))
