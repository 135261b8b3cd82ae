"""The CUDA kernel of the masked step, run in the host simulator, against the reference."""

from typing import Any

import pytest

from fastprune.ops import reference
from tests.ops.machine import assert_same
from tests.ops.masked_sgd_cases import CASES, Case, results
from tests.sim_library import HAS_COMPILER

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler (g++ or CXX)")


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, simulator: Any) -> None:
    ours, expected = case.build(), case.build()
    simulator.masked_sgd_(**ours)
    reference.masked_sgd_(**expected)
    assert_same(results(ours), results(expected))
