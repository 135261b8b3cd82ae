"""The Triton kernels of the channel switch against the reference."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fastprune.ops import triton_kernels
from fastprune.ops.triton_kernels import switch
from tests.ops.machine import assert_same
from tests.ops.switch_cases import CASES, Case, assert_right

# The interpreter computes with numpy, which warns where a GPU overflows in silence.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]
# Wider than a tile, more rows than a program sums up.
LARGE = [
    Case(shape, layout, torch.float32, torch.float32, per_example)
    for shape in ((2, 3, 41, 53), (3, 70, 11, 11), (130, 300))
    for layout in ("contiguous", "channels_last")
    for per_example in (False, True)
]
# The interpreter is slow: a seventh of the cases has every shape, layout and dtype still.
SOME = [*CASES[::7], *LARGE]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in SOME])
def test_results_are_those_of_the_reference(case: Case, triton_device: torch.device) -> None:
    grad, input, scale = case.build(triton_device)
    output = triton_kernels.channel_switch(input, scale)
    assert_right(case, output, *triton_kernels.channel_switch_backward(grad, input, scale))


def test_a_second_run_gives_the_same_bits(triton_device: torch.device) -> None:
    arguments = LARGE[0].build(triton_device)
    first, second = (triton_kernels.channel_switch_backward(*arguments) for _ in range(2))
    assert_same({"gradients": list(first)}, {"gradients": list(second)})


def test_the_cases_reach_every_border() -> None:
    """Rows and columns that do not fill their last tile, and several tiles of each."""
    shapes = []
    for case in LARGE:
        _, input, scale = case.build()
        shapes.append(switch._shape(*switch._prepared(input), scale))
    for columns in (False, True):
        of_kind = [shape for shape in shapes if shape.columns == columns]
        assert any(shape.width > shape.tile[1] for shape in of_kind)
        assert any(shape.rows % shape.tile[0] for shape in of_kind)
    assert any(s.columns and s.rows > s.tile[0] * switch.STEPS for s in shapes)


def test_the_dispatcher_knows_the_kernels_without_importing_triton() -> None:
    code = """
import sys, torch, fastprune as fp
served = fp.build_info().operators
expected = "Triton" if torch.version.cuda or torch.version.hip else "reference"
assert all(served[f"channel_switch{b}"]["CUDA"] == expected for b in ("", "_backward")), served
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
