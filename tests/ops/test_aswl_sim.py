"""The CUDA kernels of ASWL's step, run in the host simulator, against the reference."""

from typing import Any

import pytest

from fastprune.ops import reference
from tests.ops.aswl_cases import CASES, STEPS, Case, results
from tests.ops.machine import assert_same
from tests.sim_library import HAS_COMPILER

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler (g++ or CXX)")


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, simulator: Any) -> None:
    ours, expected = case.build(), case.build()
    for _ in range(STEPS):
        simulator.aswl_step_(**ours)
        reference.aswl_step_(**expected)
        assert_same(results(ours), results(expected))
