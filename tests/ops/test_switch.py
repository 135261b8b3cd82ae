"""The channel switch: whatever serves a device against the reference, and by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from tests.ops.machine import assert_machines_agree, assert_same
from tests.ops.switch_cases import CASES, DTYPES, LAYOUTS, Case, assert_right, results

SWITCH = torch.ops.fastprune.channel_switch
BACKWARD = torch.ops.fastprune.channel_switch_backward
HAS_NATIVE = fp.build_info().operators["channel_switch"]["CPU"] != "reference"
LARGE = [
    Case(shape, layout, torch.float32, torch.float32, per_example)
    for shape in ((32, 48, 16, 16), (64, 96, 4, 4), (1, 3, 300, 301), (2000, 70))
    for layout in ("contiguous", "channels_last")
    for per_example in (False, True)
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in (*CASES, *LARGE)])
def test_results_are_those_of_the_reference(case: Case, device: torch.device) -> None:
    grad, input, scale = case.build(device)
    assert_right(case, SWITCH(input, scale), *BACKWARD(grad, input, scale))
    for ours, before in zip((grad, input, scale), case.build(device), strict=True):
        assert torch.equal(ours, before)


def test_worked_example() -> None:
    """Two examples of two channels; the second channel is off."""
    x = torch.tensor([[[1.0, -2.0], [3.0, 4.0]], [[0.5, 2.0], [-1.0, 8.0]]], requires_grad=True)
    s = torch.tensor([2.0, 0.0], requires_grad=True)
    y = fp.ops.channel_switch(x, s)
    assert y.tolist() == [[[2, -4], [0, 0]], [[1, 4], [0, 0]]]
    y.backward(torch.tensor([[[1.0, 10.0], [1.0, 1.0]], [[2.0, -1.0], [0.5, 0.25]]]))
    assert x.grad is not None and s.grad is not None
    assert x.grad.tolist() == [[[2, 20], [0, 0]], [[4, -2], [0, 0]]]
    # 1 - 20 + 1 - 2, and 3 + 4 - 0.5 + 2.
    assert s.grad.tolist() == [-20, 8.5]


def test_nan_and_infinity_stay_in_their_channel(device: torch.device) -> None:
    x = torch.ones(2, 3, 40, device=device)
    x[0, 1, 7], x[1, 2, 3] = torch.nan, torch.inf
    s = torch.tensor([1.0, 2.0, 0.0], device=device)
    y = SWITCH(x, s)
    assert y.isnan().sum() == 2 and y[0, 1, 7].isnan() and y[1, 2, 3].isnan()
    grads = BACKWARD(torch.ones_like(x), x, s)[1]
    assert grads[0] == 80 and grads[1].isnan() and grads[2] == torch.inf


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_gradient_of_an_example_is_its_own(data: st.DataObject) -> None:
    """With a factor for each example: those of one factor for all are their sum."""
    sizes = st.lists(st.integers(1, 70), min_size=1, max_size=3)
    shape = (data.draw(st.integers(1, 9)), *data.draw(sizes))
    layout, dtype = data.draw(st.sampled_from(list(LAYOUTS))), data.draw(st.sampled_from(DTYPES))
    case = Case(shape, layout, dtype, torch.float64, per_example=False)
    grad, input, scale = case.build()
    each = scale.expand(shape[:2])
    assert torch.equal(SWITCH(input, each), SWITCH(input, scale))
    (dx, ds), (dx_each, ds_each) = BACKWARD(grad, input, scale), BACKWARD(grad, input, each)
    assert torch.equal(dx, dx_each)
    terms = BACKWARD(grad.abs(), input.abs(), scale)[1]
    assert ((ds_each.sum(0) - ds).abs() <= 2e-6 * terms).all()


# ---------------------------------------------------------------- machine


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in LARGE])
def test_thread_counts_and_a_second_run_give_the_same_bits(case: Case) -> None:
    expected = None
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        expected = expected or results(case)
        assert_same(results(case), expected)


@pytest.mark.skipif(not HAS_NATIVE, reason="no native library")
def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    assert_machines_agree("tests.ops.switch_cases")


# ---------------------------------------------------------------- graph

SMALL = [(5, 4), (3, 4, 6), (2, 3, 4, 5)]


def doubles(
    shape: tuple[int, ...], layout: str, per_example: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    case = Case(shape, layout, torch.float64, torch.float64, per_example)
    grad, input, scale = (t.requires_grad_() for t in case.build(device))
    return grad, input, scale


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SMALL)
def test_derivatives(
    shape: tuple[int, ...], layout: str, per_example: bool, device: torch.device
) -> None:
    grad, input, scale = doubles(shape, layout, per_example, device)
    assert torch.autograd.gradcheck(SWITCH, (input, scale))
    assert torch.autograd.gradgradcheck(SWITCH, (input, scale))
    assert torch.autograd.gradcheck(BACKWARD, (grad, input, scale))


def test_only_what_needs_a_gradient_gets_one(device: torch.device) -> None:
    _, input, scale = doubles((3, 4, 6), "contiguous", False, device)
    SWITCH(input, scale.detach()).sum().backward()
    assert torch.equal(input.grad, scale.detach()[:, None].expand_as(input))
    SWITCH(input.detach(), scale).sum().backward()
    torch.testing.assert_close(scale.grad, input.detach().sum((0, 2)))


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SMALL, (0, 3, 2), (2, 3, 0)])
def test_opcheck(
    shape: tuple[int, ...], layout: str, per_example: bool, device: torch.device
) -> None:
    grad, input, scale = doubles(shape, layout, per_example, device)
    torch.library.opcheck(SWITCH.default, (input, scale))
    torch.library.opcheck(BACKWARD.default, (grad, input, scale))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_without_a_break_gives_the_same(
    layout: str, backend: str, device: torch.device
) -> None:
    torch.compiler.reset()

    def loss(input: Tensor, scale: Tensor) -> Tensor:
        return fp.ops.channel_switch(input.relu(), scale).square().sum()

    found: list[Any] = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        _, input, scale = doubles((2, 3, 4, 5), layout, False, device)
        value = function(input, scale)
        found.append((value, *torch.autograd.grad(value, (input, scale))))
    torch.testing.assert_close(found[1], found[0])


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("input", "scale", "error", "message"),
    [
        ([[1.0]], torch.ones(1), TypeError, "input must be a tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(3), TypeError, "input must be float32"),
        (torch.ones(2, 3), torch.ones(3).half(), TypeError, "scale must be float32, float64"),
        (torch.ones(3), torch.ones(3), ValueError, r"input must be \[N, C\].*got shape \(3,\)"),
        (torch.ones(2, 3, 4), torch.ones(4), ValueError, r"\[C\] or \[N, C\].*\(2, 3, 4\), got"),
        (torch.ones(2, 3, 4), torch.ones(1, 3), ValueError, r"got \(1, 3\)"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), ValueError, "scale must be on cpu"),
    ],
)
def test_what_is_wrong_is_said(input: Any, scale: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fp.ops.channel_switch(input, scale)


@pytest.mark.skipif(not HAS_NATIVE, reason="the reference trusts its callers")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2)), "scale must be"),
        ((torch.ones(2, 3), torch.ones(3, 3)), "scale must be"),
        ((torch.ones(2, 3), torch.ones(())), "scale must be"),
        ((torch.ones(3), torch.ones(3)), "input must be"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(3)), "values must be float32"),
    ],
)
def test_unsafe_memory_accesses_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        SWITCH(*arguments)
    with pytest.raises(RuntimeError, match=message):
        BACKWARD(arguments[0], *arguments)


@pytest.mark.skipif(not HAS_NATIVE, reason="the reference trusts its callers")
def test_a_gradient_of_another_shape_or_dtype_is_refused() -> None:
    for grad in (torch.ones(2, 4), torch.ones(3, 2), torch.ones(2, 3).double()):
        with pytest.raises(RuntimeError, match="grad must have the shape and dtype"):
            BACKWARD(grad, torch.ones(2, 3), torch.ones(3))
