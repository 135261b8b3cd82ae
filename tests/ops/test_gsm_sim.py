"""The CUDA kernels of GSM's step, run in the host simulator, against the reference."""

from typing import Any

import pytest

from fastprune.ops import reference
from tests.ops.gsm_cases import CASES, STEP_CASES, Case, results
from tests.ops.machine import assert_same
from tests.sim_library import HAS_COMPILER

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler (g++ or CXX)")


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, simulator: Any) -> None:
    ours, expected = case.build(), case.build()
    simulator.gsm_update_(**ours)
    reference.gsm_update_(**expected)
    assert_same(results(ours), results(expected))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in STEP_CASES])
def test_the_step_selects_and_updates(case: Case, simulator: Any) -> None:
    ours, expected = case.build_step(), case.build_step()
    simulator.gsm_step_(**ours)
    reference.gsm_step_(**expected)
    assert_same(results(ours), results(expected))
