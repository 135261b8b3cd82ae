"""GSM's update: whatever serves a device against the reference, to the bit, and by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from fastprune.ops.reference.gsm import SETTINGS
from tests.ops.gsm_cases import (
    CASES,
    STEP_CASES,
    VARIANTS,
    Case,
    results,
    settings_of,
)
from tests.ops.machine import assert_machines_agree, assert_same, bits

UPDATE = torch.ops.fastprune.gsm_update_
STEP = torch.ops.fastprune.gsm_step_
BY_LABEL = {case.label: case for case in CASES}


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, v) for key, v in value.items()}
    return [on(device, v) for v in value] if isinstance(value, list) else value


def built(case: Case, device: str | torch.device = "cpu") -> dict[str, Any]:
    arguments: dict[str, Any] = on(torch.device(device), case.build())
    return arguments


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, device: torch.device) -> None:
    ours, expected = built(case, device), built(case, device)
    UPDATE(**ours)
    with fp.use_reference():
        UPDATE(**expected)
    assert_same(results(ours), results(expected))
    for name in ("gradients", "gates", "threshold", "tie_end", "settings"):
        assert_untouched(ours[name], built(case, device)[name])


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in STEP_CASES])
def test_the_step_selects_and_updates(case: Case, device: torch.device) -> None:
    ours, expected = (on(device, case.build_step()) for _ in range(2))
    STEP(**ours)
    with fp.use_reference():
        STEP(**expected)
    assert_same(results(ours), results(expected))


def assert_untouched(value: Any, before: Any) -> None:
    pairs = zip(value, before, strict=True) if isinstance(value, list) else [(value, before)]
    for a, b in pairs:
        assert torch.equal(a.nan_to_num(7) if a.is_floating_point() else a,
                           b.nan_to_num(7) if b.is_floating_point() else b)  # fmt: skip


def test_labels_are_unique_and_every_variant_is_there() -> None:
    assert len(BY_LABEL) == len(CASES) >= 50
    assert {v for case in CASES for v in case.variants} == set(VARIANTS)


# ---------------------------------------------------------------- numbers worked by hand


def worked_example() -> dict[str, Any]:
    return {
        "weights": [torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[3.0, -0.1]])],
        "momenta": [torch.zeros(2, 2), torch.zeros(1, 2)],
        "copies": [],
        "gradients": [torch.tensor([[0.2, 0.1], [-0.6, 5.0]]), torch.tensor([[-0.05, 1.0]])],
        "gates": [],
        # |w * g| is .2, .2, .3, 0 | .15, .1: with Q = 3 no tie is left out.
        "threshold": torch.tensor(0.2),
        "tie_end": torch.tensor(6),
        "positions": [0, 4],
        "settings": torch.tensor([[0.1, 0.5, 0.0, 0.01, 0.0, 0.0]], dtype=torch.float64),
        "rows": [0, 0],
        "block": [1, 1],
    }


@pytest.mark.parametrize("double", [False, True], ids=["fp32", "fp64"])
def test_worked_example_g1(double: bool) -> None:
    arguments = worked_example()
    if double:
        names = ("weights", "momenta", "gradients")
        arguments |= {name: [t.double() for t in arguments[name]] for name in names}
        # In float64 the decimal inputs are not exact: the tie of the example is that of fp32.
        arguments["threshold"] = torch.tensor(0.19, dtype=torch.float64)
    UPDATE(**arguments)
    close = {"rtol": 1e-6, "atol": 0.0}
    (w1, w2), (z1, z2) = arguments["weights"], arguments["momenta"]
    expected = [[0.979, -2.008], [0.5595, 0]], [[2.997, -0.0999]]
    torch.testing.assert_close(w1, torch.tensor(expected[0], dtype=w1.dtype), **close)
    torch.testing.assert_close(w2, torch.tensor(expected[1], dtype=w1.dtype), **close)
    expected = [[0.21, 0.08], [-0.595, 0]], [[0.03, -0.001]]
    torch.testing.assert_close(z1, torch.tensor(expected[0], dtype=w1.dtype), **close)
    torch.testing.assert_close(z2, torch.tensor(expected[1], dtype=w1.dtype), **close)
    assert w1[1, 1] == 0  # a zero weight with a gradient of 5 stays exactly 0


def test_worked_example_g3_passive_decay() -> None:
    """Never active: w follows the closed form, whatever its gradient is."""
    arguments = worked_example()
    arguments |= {
        "weights": [torch.tensor([3.0], dtype=torch.float64)],
        "momenta": [torch.zeros(1, dtype=torch.float64)],
        "gradients": [torch.tensor([1e6], dtype=torch.float64)],
        "threshold": torch.tensor(torch.nan, dtype=torch.float64),
        "positions": [0],
        "rows": [0],
    }
    (weight,) = arguments["weights"]
    expected = {1: 2.997, 2: 2.992503, 3: 2.987261997, 10: 2.946352764}
    for step in range(1, 11):
        UPDATE(**arguments)
        closed = 3.0060606063 * 0.9979959758**step - 0.0060606063 * 0.5010040242**step
        assert float(weight) == pytest.approx(closed, rel=1e-8)
        if step in expected:
            assert float(weight) == pytest.approx(expected[step], rel=1e-9)


def test_a_tie_is_active_before_the_tie_end_and_passive_from_it() -> None:
    arguments = worked_example()
    arguments["tie_end"] = torch.tensor(1)  # Q = 2: the second 0.2 is left out
    UPDATE(**arguments)
    weight, momentum = arguments["weights"][0], arguments["momenta"][0]
    assert momentum[0].tolist() == pytest.approx([0.21, -0.02])
    assert weight[0].tolist() == pytest.approx([0.979, -1.998])


# ---------------------------------------------------------------- gating


def test_nan_of_a_passive_weight_does_not_leak() -> None:
    """A gate that multiplies would write NaN here; by a threshold NaN is always active."""
    arguments = worked_example()
    arguments["gradients"] = [torch.full((2, 2), torch.nan), torch.tensor([[1.0, 1.0]])]
    arguments["gates"] = [torch.zeros(2, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)]
    UPDATE(**arguments)
    assert all(bool(t.isfinite().all()) for t in arguments["weights"] + arguments["momenta"])
    assert torch.equal(arguments["momenta"][0], torch.tensor([[0.01, -0.02], [0.005, 0.0]]))


def test_nan_of_an_active_weight_is_not_hidden() -> None:
    arguments = worked_example()
    arguments["gradients"][0][0, 0] = torch.nan
    UPDATE(**arguments)
    assert arguments["weights"][0].isnan().tolist() == [[True, False], [False, False]]


def test_a_skipped_step_changes_no_bit() -> None:
    case = BY_LABEL["found_inf 1"]
    arguments, before = built(case), built(case)
    UPDATE(**arguments)
    assert_same(results(arguments), results(before))
    arguments["found_inf"] = torch.tensor(0.0)
    UPDATE(**arguments)
    assert not torch.equal(arguments["weights"][2], before["weights"][2])


def test_scaled_gradients_give_the_step_of_the_plain_ones() -> None:
    """The threshold is that of the scaled ones; a power of two costs no bit."""
    plain = built(BY_LABEL["gsm"])
    scaled = built(BY_LABEL["gsm"])
    scaled["gradients"] = [g * 1024 for g in scaled["gradients"]]
    scaled |= {"threshold": scaled["threshold"] * 1024, "grad_scale": torch.tensor(1024.0)}
    UPDATE(**plain)
    UPDATE(**scaled)
    assert_same(results(scaled), results(plain))


def test_copies_are_the_rounded_masters() -> None:
    for name in ("bf16, contiguous", "fp16, channels_last"):
        arguments = built(BY_LABEL[name])
        UPDATE(**arguments)
        for weight, copy in zip(arguments["weights"], arguments["copies"], strict=True):
            assert torch.equal(bits(copy), bits(weight.to(copy.dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """Halfway cases, subnormals, the largest finite number, infinities and NaN."""
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator())
    weights = torch.cat(
        [
            patterns.int().view(torch.float32),
            torch.arange(2**16).int().bitwise_left_shift(16).add(0x8000).view(torch.float32),
            torch.tensor([65504.0, 65519.9, 65520.0, -65536.0, torch.inf, -torch.inf, torch.nan]),
            torch.arange(4096).double().mul(2.0**-26).float(),  # around fp16's subnormals
        ]
    )
    copy = torch.zeros_like(weights, dtype=dtype)
    arguments = worked_example() | {
        "weights": [weights],
        "momenta": [torch.zeros_like(weights)],
        "copies": [copy],
        "gradients": [torch.zeros_like(weights)],
        "positions": [-1],
        "settings": settings_of(["lr 0"]) * 0,
        "rows": [0],
    }
    UPDATE(**arguments)
    assert torch.equal(bits(copy), bits(weights.to(dtype)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_gate_covers_its_ragged_block(layout: str) -> None:
    case = next(c for c in CASES if c.label == f"blocks of (2, 3), {layout}")
    arguments, before = built(case), built(case)
    arguments["settings"] = before["settings"] = torch.tensor(
        [[0.1, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64
    )
    UPDATE(**arguments)
    for i, (weight, gate) in enumerate(zip(arguments["weights"], arguments["gates"], strict=True)):
        moved = weight != before["weights"][i]
        for index in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape)).tolist():
            cell = index[0] // 2, index[1] // 3, *index[2:]
            assert bool(moved[tuple(index)]) == bool(gate[cell])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_exactly_the_selected_weights_get_their_gradient(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=5))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    few = data.draw(st.integers(1, 6))
    weights = [torch.randint(1, few + 1, (size,), generator=random).float() for size in sizes]
    gradients = [torch.randint(1, 3, (size,), generator=random).float() for size in sizes]
    num_kept = data.draw(st.integers(0, sum(sizes)))
    found = fp.global_topk(weights, num_kept, score="saliency", gradients=gradients)
    arguments = worked_example() | {
        "weights": weights,
        "momenta": [torch.zeros_like(w) for w in weights],
        "gradients": gradients,
        "threshold": found.threshold,
        "tie_end": found.tie_end,
        "positions": [sum(sizes[:i]) for i in range(len(sizes))],
        "settings": torch.tensor([[0.1, 0.5, 0, 0, 0, 0]], dtype=torch.float64),
        "rows": [0] * len(sizes),
    }
    UPDATE(**arguments)
    active = torch.cat([m != 0 for m in arguments["momenta"]])
    masks = fp.global_topk_masks(
        [w + 0.05 * z for w, z in zip(weights, arguments["momenta"], strict=True)], 0
    )
    assert int(active.sum()) == num_kept and len(masks) == len(sizes)
    everything = torch.cat(arguments["momenta"])
    assert torch.equal(everything[active], torch.cat(gradients)[active])


# ---------------------------------------------------------------- machine and graph


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("label", ["big, fp32", "ties cut at 0.5", "bf16, ties cut"])
def test_thread_counts_and_a_second_run_give_the_same_bits(label: str) -> None:
    expected = None
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        arguments = built(BY_LABEL[label])
        UPDATE(**arguments)
        expected = expected or results(arguments)
        assert_same(results(arguments), expected)


@pytest.mark.skipif(
    fp.build_info().operators["gsm_update_"]["CPU"] == "reference", reason="no native library"
)
def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    assert_machines_agree("tests.ops.gsm_cases")


OPCHECKED = [
    "gsm",
    "every variant in one call",
    "gsm, fp64",
    "bf16, channels_last",
    "blocks of (2, 3), contiguous",
    "scale 3.0",
    "found_inf 1",
]


@pytest.mark.parametrize("label", OPCHECKED)
def test_opcheck(label: str, device: torch.device) -> None:
    torch.library.opcheck(UPDATE.default, (), built(BY_LABEL[label], device))
    if (case := BY_LABEL[label]) in STEP_CASES:
        torch.library.opcheck(STEP.default, (), on(device, case.build_step()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("label", ["gsm", "bf16, channels_last", "blocks of (2, 3), contiguous"])
def test_compiled_without_a_break_gives_the_same(
    label: str, backend: str, device: torch.device
) -> None:
    torch.compiler.reset()
    ours, expected = built(BY_LABEL[label], device), built(BY_LABEL[label], device)

    def two_steps(arguments: dict[str, Any]) -> None:
        UPDATE(**arguments)
        UPDATE(**arguments)

    two_steps(expected)
    torch.compile(two_steps, fullgraph=True, backend=backend)(ours)
    assert_same(results(ours), results(expected))


def test_the_arithmetic_is_one_rounding_where_torch_has_one() -> None:
    """z = d + beta z with one fma: the product's lowest bits decide the last place."""
    beta, old, gradient = 1 + 2.0**-23, 1 + 2.0**-23, 2.0**-30
    arguments = worked_example() | {
        "weights": [torch.zeros(1)],
        "momenta": [torch.tensor([old])],
        "gradients": [torch.tensor([gradient])],
        "positions": [-1],
        "rows": [0],
        "settings": torch.tensor([[1.0, beta, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64),
    }
    UPDATE(**arguments)
    product = torch.tensor(beta * old, dtype=torch.float64).float()  # rounded once
    assert float(arguments["momenta"][0]) == float(product + gradient)
    assert math.isclose(float(arguments["weights"][0]), -float(product))


@pytest.mark.skipif(
    fp.build_info().operators["gsm_update_"]["CPU"] == "reference",
    reason="the reference trusts its callers",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momenta": [torch.zeros(2, 2)]}, "one entry per weight"),
        ({"rows": [0, 1]}, r"rows\[1\] is not a row"),
        ({"settings": torch.zeros(1, len(SETTINGS) - 1, dtype=torch.float64)}, "settings must be"),
        ({"settings": torch.zeros(1, len(SETTINGS))}, "settings must be"),
        ({"momenta": [torch.zeros(2, 2), torch.zeros(2, 1)]}, "one shape and one layout"),
        ({"momenta": [torch.zeros(2, 2).double(), torch.zeros(1, 2)]}, "float32 or float64"),
        ({"gates": [torch.ones(1, 2).bool(), torch.ones(1, 2).bool()]}, "one bool per block"),
        ({"gates": [torch.ones(2, 2), torch.ones(1, 2)]}, "contiguous bool"),
        ({"copies": [torch.zeros(2, 1).half(), torch.zeros(1, 2).half()]}, "layout of weights"),
    ],
    ids=str,
)
def test_what_would_be_unsafe_memory_access_is_refused(
    change: dict[str, Any], message: str
) -> None:
    arguments = worked_example() | change
    before = [w.clone() for w in arguments["weights"]]
    with pytest.raises(RuntimeError, match=message):
        UPDATE(**arguments)
    assert all(torch.equal(w, b) for w, b in zip(arguments["weights"], before, strict=True))


@pytest.mark.skipif(
    fp.build_info().operators["gsm_step_"]["CPU"] == "reference",
    reason="the reference trusts its callers",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": [0, 5]}, "without gaps"),
        ({"num_kept": torch.tensor(2.0)}, "num_kept must be one int64"),
        ({"num_kept": torch.tensor([2, 3])}, "num_kept must be one int64"),
        ({"rows": [0]}, "one entry per weight"),
    ],
    ids=str,
)
def test_a_step_refuses_what_its_selection_could_not_use(
    change: dict[str, Any], message: str
) -> None:
    arguments = worked_example()
    for name in ("gates", "threshold", "tie_end", "block"):
        del arguments[name]
    arguments |= {"num_kept": torch.tensor(3), **change}
    before = [w.clone() for w in arguments["weights"]]
    with pytest.raises(RuntimeError, match=message):
        STEP(**arguments)
    assert all(torch.equal(w, b) for w, b in zip(arguments["weights"], before, strict=True))
