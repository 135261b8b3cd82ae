"""ASWL's step: whatever serves a device against the reference, to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastprune as fp
from fastprune.ops.reference.aswl import BOTH, PRUNED
from tests.ops.aswl_cases import ALL, BIG, CASES, L2, POST_BN, STEPS, Case, results
from tests.ops.machine import assert_machines_agree, assert_same

STEP = torch.ops.fastprune.aswl_step_
BY_LABEL = {case.label: case for case in CASES}
HAS_NATIVE = fp.build_info().operators["aswl_step_"]["CPU"] != "reference"


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, v) for key, v in value.items()}
    return [on(device, v) for v in value] if isinstance(value, list) else value


def built(case: Case, device: str | torch.device = "cpu") -> dict[str, Any]:
    arguments: dict[str, Any] = on(torch.device(device), case.build())
    return arguments


def both(case: Case, device: str | torch.device = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """After STEPS steps, each of which began at the same bits and led to the same."""
    ours, expected = built(case, device), built(case, device)
    for _ in range(STEPS):
        STEP(**ours)
        with fp.use_reference():
            STEP(**expected)
        assert_same(results(ours), results(expected))
    return ours, expected


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, device: torch.device) -> None:
    ours, _ = both(case, device)
    before = built(case, device)
    for name in ("gradients", "settings", "layers", "roles"):
        torch.testing.assert_close(ours[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_labels_are_unique() -> None:
    assert len(BY_LABEL) == len(CASES) >= 40


def test_the_cases_have_warm_and_cold_thresholds() -> None:
    """Or one of the two ways to a threshold would not be tested."""
    steps = {}
    for label in ("big", "attention moves fast"):
        arguments = built(BY_LABEL[label])
        before = arguments["attention"][:2, 2].clone()
        STEP(**arguments)
        steps[label] = float((arguments["attention"][:2, 2] / before).log2().abs().max())
    assert steps["big"] < 1 / 64 and steps["attention moves fast"] > 1 / 8, steps


@pytest.mark.parametrize("alpha", [0.7, 1.3, 3.0])
def test_other_powers_agree_but_for_the_last_bits(alpha: float, device: torch.device) -> None:
    case = Case("power", POST_BN, options=(("alpha", alpha),))
    ours, expected = built(case, device), built(case, device)
    STEP(**ours)
    with fp.use_reference():
        STEP(**expected)
    table = expected["attention"]
    torch.testing.assert_close(ours["attention"], table, rtol=1e-13, atol=1e-15)
    for a, b in zip(ours["parameters"], expected["parameters"], strict=True):
        assert torch.equal(a != 0, b != 0)
        torch.testing.assert_close(a, b)


def test_a_skipped_step_changes_no_bit() -> None:
    case = BY_LABEL["found_inf 1"]
    arguments = built(case)
    STEP(**arguments)
    assert_same(results(arguments), results(built(case)))
    arguments["found_inf"] = torch.tensor(0.0)
    STEP(**arguments)
    assert not torch.equal(arguments["attention"], built(case)["attention"])


# ---------------------------------------------------------------- machine and graph


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("label", ["big", "bf16, contiguous", "ties, cut, contiguous"])
def test_thread_counts_and_a_second_run_give_the_same_bits(label: str) -> None:
    expected = None
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        arguments = built(BY_LABEL[label])
        for _ in range(STEPS):
            STEP(**arguments)
        expected = expected or results(arguments)
        assert_same(results(arguments), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(not HAS_NATIVE, reason="no native library")
def test_a_layer_that_is_the_work_of_all_threads() -> None:
    case = Case("huge", ((((2101, 2003), BOTH),), (((99, 99), PRUNED),)), options=L2)
    ours = {}
    for threads in (2, 1):
        torch.set_num_threads(threads)
        ours[threads], _ = both(case)
    assert_same(results(ours[2]), results(ours[1]))


@pytest.mark.skipif(not HAS_NATIVE, reason="no native library")
def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    assert_machines_agree("tests.ops.aswl_cases")


OPCHECKED = ["plain", "fp64, post_bn", "bf16, channels_last", "no buffers", "found_inf 1"]


@pytest.mark.parametrize("label", OPCHECKED)
def test_opcheck(label: str, device: torch.device) -> None:
    torch.library.opcheck(STEP.default, (), built(BY_LABEL[label], device))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("label", ["plain", "bf16, channels_last"])
def test_compiled_without_a_break_gives_the_same(
    label: str, backend: str, device: torch.device
) -> None:
    torch.compiler.reset()
    ours, expected = built(BY_LABEL[label], device), built(BY_LABEL[label], device)

    def two_steps(arguments: dict[str, Any]) -> None:
        STEP(**arguments)
        STEP(**arguments)

    two_steps(expected)
    torch.compile(two_steps, fullgraph=True, backend=backend)(ours)
    assert_same(results(ours), results(expected))


# ---------------------------------------------------------------- what is refused


def short(name: str, i: int = 0) -> Any:
    """One tensor of a list without its last row."""
    return lambda a: a[name].__setitem__(i, a[name][i][:-1].clone())


def replaced(name: str, value: Any) -> Any:
    return lambda a: a.__setitem__(name, value(a[name]))


@pytest.mark.skipif(not HAS_NATIVE, reason="the reference trusts its callers")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("dense", lambda x: x[1:]), "one entry per parameter"),
        (replaced("momenta", lambda x: x[1:]), "one entry per parameter"),
        (replaced("roles", lambda x: x[1:]), "one entry per parameter"),
        (replaced("attention", lambda x: x[:, :2].clone()), "matrix of 3 columns"),
        (replaced("attention", lambda x: x[:1]), "int64 number for each of its rows"),
        (replaced("tie_end", lambda x: x.int()), "int64 number for each of its rows"),
        (replaced("multiplier", lambda x: x.float()), "multiplier must be one float64"),
        (replaced("settings", lambda x: x[1:]), "settings must be 8"),
        (replaced("roles", lambda x: [7, *x[1:]]), r"roles\[0\]"),
        (replaced("layers", lambda x: [0, 0, 0, 0, 1]), r"dense\[3\] must|a row for each layer"),
        (replaced("layers", lambda x: [0, 0, 0, 2, 2]), r"layers\[3\]"),
        (replaced("roles", lambda x: [2, 2, 2, 1, 2]), "each layer have a tensor that is pruned"),
        (short("dense"), r"dense\[0\] must be"),
        (short("momenta"), r"momenta\[0\] must have"),
        (short("gradients", 3), r"gradients\[3\] must have"),
        (replaced("dense", lambda x: [x[0].half(), *x[1:]]), r"dense\[0\] must be"),
        (replaced("gradients", lambda x: [x[0].double(), *x[1:]]), r"gradients\[0\] must have"),
    ],
    ids=str,
)
def test_what_would_be_unsafe_memory_access_is_refused(change: Any, message: str) -> None:
    arguments = built(BY_LABEL["post_bn"])
    change(arguments)
    before = [t.clone() for t in arguments["parameters"]]
    with pytest.raises(RuntimeError, match=message):
        STEP(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments["parameters"], before, strict=True))


def test_all_lists_of_special_values_are_named() -> None:
    assert {name for case in CASES for name in case.nan} == set(ALL)
    assert BIG[0][0][1] == BOTH
