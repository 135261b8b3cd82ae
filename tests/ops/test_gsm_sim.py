"""The CUDA kernel of GSM's update, run in the host simulator, against the reference."""

from typing import Any

import pytest
import torch

from fastprune.ops import reference
from tests.ops.gsm_cases import CASES, CHANGED, Case, bits, results
from tests.sim_library import HAS_COMPILER

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler (g++ or CXX)")


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, simulator: Any) -> None:
    ours, expected = case.build(), case.build()
    simulator.gsm_update_(**ours)
    reference.gsm_update_(**expected)
    found, wanted = results(ours), results(expected)
    for name in CHANGED:
        for i, (a, b) in enumerate(zip(found[name], wanted[name], strict=True)):
            assert torch.equal(bits(a), bits(b)), f"{name}[{i}]"
