"""The Triton kernel of SDprun's row groups against the reference, bit for bit."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprune.ops import reference

pytest.importorskip("triton")

from triton.runtime import interpreter

from fastprune.ops import triton_kernels
from tests.ops.machine import bits
from tests.ops.sdprun_cases import CASES, COLUMNS, COUPLED, Case, results

# The interpreter computes with numpy, which warns where a GPU overflows in silence.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


def of_rows(case: Case) -> Case:
    """The same with those layers that the kernel takes."""
    layers = (layer for layer in case.layers if len(layer) == 1 and layer[0][1] == 0)
    return replace(case, layers=tuple(layers))


CASES_OF_ROWS = [
    case for case in map(of_rows, CASES) if case.layers and case.layout != "transposed"
]


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter rounds twice in `tl.fma`; torch's addition of a multiple rounds once."""

    def create_fma(_: Any, x: Any, y: Any, z: Any) -> Any:
        (factor,) = set(y.data.flatten().tolist())
        total = torch.from_numpy(z.data.copy()).add_(torch.from_numpy(x.data), alpha=factor)
        return interpreter.TensorHandle(total.numpy(), z.dtype.scalar)

    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    yield


def built(case: Case, device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return [move(v) for v in value] if isinstance(value, list) else value

    return {name: move(value) for name, value in case.build().items()}


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES_OF_ROWS])
def test_bits_are_those_of_the_reference(case: Case, triton_device: torch.device) -> None:
    ours, expected = built(case, triton_device), built(case, triton_device)
    triton_kernels.sdprun_update_(**ours)
    reference.sdprun_update_(**expected)
    found, wanted = results(ours), results(expected)
    assert torch.equal(bits(found.pop("norms")), bits(wanted.pop("norms")))
    for name in ("accumulators", "momenta", "weights"):
        for i, (a, b) in enumerate(zip(found[name], wanted[name], strict=True)):
            assert torch.equal(bits(a), bits(b)), f"{name}[{i}]"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("", COUPLED), "a layer of its own"),
        (Case("", COLUMNS[:1]), "column_groups=1"),
        (Case("", layout="transposed"), "dimension 0 outermost in memory"),
    ],
)
def test_what_the_kernel_cannot_address_is_refused(
    case: Case, message: str, triton_device: torch.device
) -> None:
    with pytest.raises(ValueError, match=message):
        triton_kernels.sdprun_update_(**built(case, triton_device))
