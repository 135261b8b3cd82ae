"""The CUDA kernels of SDprun, run in the host simulator, against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastprune.ops import reference
from tests.ops.machine import assert_same, bits
from tests.ops.sdprun_cases import CASES, Case, guard_arguments, results
from tests.sim_library import HAS_COMPILER

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler (g++ or CXX)")
Arguments = dict[str, Any]


def step(operators: Any, arguments: Arguments) -> None:
    """One step but for the threshold."""
    operators.sdprun_update_(**arguments)
    operators.sdprun_guard_(**guard_arguments(arguments))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, simulator: Any) -> None:
    ours, expected = case.build(), case.build()
    simulator.sdprun_threshold_(ours["progress"], ours["settings"], ours["found_inf"])
    reference.sdprun_threshold_(expected["progress"], expected["settings"], expected["found_inf"])
    torch.testing.assert_close(ours["progress"], expected["progress"], rtol=1e-14, atol=0)
    expected["progress"].copy_(ours["progress"])  # other logarithms differ in the last place
    step(simulator, ours)
    step(reference, expected)
    assert_same(results(ours), results(expected))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_the_guard_may_follow_in_the_same_call(case: Case, simulator: Any) -> None:
    ours, expected = case.build(), case.build()
    simulator.sdprun_update_(**ours, guard=True)
    step(reference, expected)
    assert_same(results(ours), results(expected))


def test_thresholds_are_those_of_the_cpu(simulator: Any) -> None:
    """To the bit, and of more rows than one block has threads."""
    random = torch.Generator().manual_seed(0)
    settings = torch.rand(600, 9, generator=random, dtype=torch.float64) + 0.01
    settings[::2, 7:] *= 1000  # steered
    settings[1::2, 7:] = 0
    progress = torch.randint(0, 900, (600, 2), generator=random).double()
    expected = progress.clone()
    simulator.sdprun_threshold_(progress, settings)
    torch.ops.fastprune.sdprun_threshold_(expected, settings)
    assert torch.equal(bits(progress), bits(expected))


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, not at a boundary of vectors."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("moved", ["accumulators", "momenta", "weights", "gradients"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_tensors_at_odd_addresses(moved: str, weight: torch.dtype, simulator: Any) -> None:
    case = Case("odd", (((( 7, 129), 0),), (((40, 6, 3), 1),), (((9, 1500), 0), ((9,), 0))),
                ("momentum",), weight=weight, outside=(1,))  # fmt: skip
    ours, expected = case.build(), case.build()
    ours[moved] = [shifted(t) for t in ours[moved]]
    step(simulator, ours)
    step(reference, expected)
    assert_same(results(ours), results(expected))


def test_the_guard_of_a_part_of_a_layer_looks_at_the_whole(simulator: Any) -> None:
    """The rows of this process are numbers 2 and 3 of a layer of 4, behind a layer of 3."""
    v = torch.tensor([[1.0], [3.0]])
    settings = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 0, 0]], dtype=torch.float64)
    progress = torch.tensor([[1.0, 9.0]], dtype=torch.float64)
    for norms, expected in (([2.0, 4.0], [0, 0]), ([2.0, 3.0], [0, 0]), ([2.0, 1.0], [0, 3])):
        everywhere = torch.tensor([7.0, 7, 7, *norms, 1, 3], dtype=torch.float64)
        w = torch.zeros_like(v)
        simulator.sdprun_guard_([w], [v], everywhere, progress, settings, [0], [5], [0], [3], [4])
        assert w.flatten().tolist() == expected


def test_coupled_tensors_must_have_the_same_channels(simulator: Any) -> None:
    arguments = Case("coupled", (((((4, 3), 0), ((4,), 0))),)).build()
    for name in ("accumulators", "weights", "gradients"):
        arguments[name][1] = arguments[name][1][:3].clone()
    with pytest.raises(RuntimeError, match="as many channels as weights"):
        simulator.sdprun_update_(**arguments)
