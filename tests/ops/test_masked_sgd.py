"""The masked step: whatever serves a device against the reference, to the bit, and by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from fastprune.ops.reference.gsm import SETTINGS
from fastprune.ops.reference.masked_sgd import packed, unpacked
from tests.ops.gsm_cases import LAYOUTS, VARIANTS, settings_of
from tests.ops.machine import assert_machines_agree, assert_same, bits
from tests.ops.masked_sgd_cases import CASES, CHANGED, Case, results

STEP = torch.ops.fastprune.masked_sgd_
BY_LABEL = {case.label: case for case in CASES}
HAS_NATIVE = fp.build_info().operators["masked_sgd_"]["CPU"] != "reference"


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, v) for key, v in value.items()}
    return [on(device, v) for v in value] if isinstance(value, list) else value


def built(case: Case, device: str | torch.device = "cpu") -> dict[str, Any]:
    arguments: dict[str, Any] = on(torch.device(device), case.build())
    return arguments


def assert_pruned_are_zero(case: Case, arguments: dict[str, Any]) -> None:
    """+0.0 to the bit, in every part of every masked tensor."""
    for i, mask in enumerate(case.masks()):
        if i in case.dense:
            continue
        for name in CHANGED:
            tensors = arguments[name]
            if tensors and tensors[i].numel():
                assert not bits(tensors[i].cpu())[~mask].any(), f"{name}[{i}]"


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, device: torch.device) -> None:
    ours, expected = built(case, device), built(case, device)
    STEP(**ours)
    with fp.use_reference():
        STEP(**expected)
    assert_same(results(ours), results(expected))
    if case.found_inf != 1.0:
        assert_pruned_are_zero(case, ours)
    before = built(case, device)
    for name in ("gradients", "masks", "settings"):
        torch.testing.assert_close(ours[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_labels_are_unique_and_every_variant_is_there() -> None:
    assert len(BY_LABEL) == len(CASES) >= 40
    assert {v for case in CASES for v in case.variants} == set(VARIANTS)


# ---------------------------------------------------------------- numbers worked by hand


def worked_example() -> dict[str, Any]:
    return {
        "weights": [torch.tensor([[1.0, -2.0], [0.5, 4.0]]), torch.tensor([3.0])],
        "momenta": [torch.tensor([[0.2, 0.4], [-0.6, 1.0]]), torch.zeros(1)],
        "copies": [],
        "gradients": [torch.tensor([[0.5, 1.0], [-1.0, 2.0]]), torch.tensor([-0.5])],
        # Elements 0 and 3 are kept: 1 + 8.
        "masks": [torch.tensor([9], dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)],
        "settings": torch.tensor([[0.1, 0.5, 0.0, 0.01, 0.0, 0.0]], dtype=torch.float64),
        "rows": [0, 0],
    }


def test_worked_example() -> None:
    """Kept: z = 0.5 z + g + 0.01 w, w = w - 0.1 z. Pruned: 0."""
    arguments = worked_example()
    STEP(**arguments)
    (w1, w2), (z1, z2) = arguments["weights"], arguments["momenta"]
    torch.testing.assert_close(z1, torch.tensor([[0.61, 0.0], [0.0, 2.54]]))
    torch.testing.assert_close(w1, torch.tensor([[0.939, 0.0], [0.0, 3.746]]))
    torch.testing.assert_close(z2, torch.tensor([-0.47]))
    torch.testing.assert_close(w2, torch.tensor([3.047]))
    assert not bits(w1)[[0, 1], [1, 0]].any() and not bits(z1)[[0, 1], [1, 0]].any()


def test_a_kept_nan_is_not_hidden() -> None:
    arguments = worked_example()
    arguments["gradients"][0][:] = torch.nan
    STEP(**arguments)
    assert arguments["weights"][0].isnan().tolist() == [[True, False], [False, True]]


def test_an_unused_bit_of_the_last_byte_says_nothing() -> None:
    plain, other = worked_example(), worked_example()
    other["masks"][0] |= 0xF0
    STEP(**plain)
    STEP(**other)
    assert_same(results(other), results(plain))


def test_without_a_buffer_the_momentum_is_zero() -> None:
    ours, expected = worked_example(), worked_example()
    ours["momenta"] = [torch.empty(0), torch.empty(0)]
    expected["settings"][0, SETTINGS.index("momentum")] = 0
    STEP(**ours)
    STEP(**expected)
    for a, b in zip(ours["weights"], expected["weights"], strict=True):
        assert torch.equal(bits(a), bits(b))


def test_a_skipped_step_changes_no_bit() -> None:
    case = BY_LABEL["found_inf 1"]
    arguments, before = built(case), built(case)
    STEP(**arguments)
    assert_same(results(arguments), results(before))
    arguments["found_inf"] = torch.tensor(0.0)
    STEP(**arguments)
    assert not torch.equal(arguments["weights"][2], before["weights"][2])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_bit_is_its_element_in_every_layout(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
    layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    mask = layout(torch.rand(shape, generator=random) < 0.5)
    code = packed(mask)
    assert code.dtype == torch.uint8 and code.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpacked(code, mask), mask)
    in_memory = mask.as_strided((mask.numel(),), (1,))
    for i, kept in enumerate(in_memory.tolist()):
        assert bool(code[i // 8] >> i % 8 & 1) == kept


# ---------------------------------------------------------------- machine and graph


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("label", ["big", "bf16, big"])
def test_thread_counts_and_a_second_run_give_the_same_bits(label: str) -> None:
    expected = None
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        arguments = built(BY_LABEL[label])
        STEP(**arguments)
        expected = expected or results(arguments)
        assert_same(results(arguments), expected)


@pytest.mark.skipif(not HAS_NATIVE, reason="no native library")
def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    assert_machines_agree("tests.ops.masked_sgd_cases")


OPCHECKED = [
    "plain",
    "every variant in one call",
    "plain, fp64",
    "bf16, channels_last",
    "some buffers",
    "scale 3.0",
    "found_inf 1",
]


@pytest.mark.parametrize("label", OPCHECKED)
def test_opcheck(label: str, device: torch.device) -> None:
    torch.library.opcheck(STEP.default, (), built(BY_LABEL[label], device))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("label", ["plain", "bf16, channels_last", "some buffers"])
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


@pytest.mark.skipif(not HAS_NATIVE, reason="the reference trusts its callers")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": [torch.tensor([9], dtype=torch.uint8)]}, "masks must have one entry"),
        ({"masks": [torch.zeros(2).byte(), torch.zeros(0).byte()]}, "one bit per element"),
        ({"masks": [torch.zeros(1), torch.zeros(0).byte()]}, "contiguous uint8"),
        ({"momenta": [torch.zeros(2, 2)]}, "one entry per weight"),
        ({"momenta": [torch.zeros(2, 2), torch.zeros(2)]}, "one shape and one layout"),
        ({"momenta": [torch.zeros(2, 2).double(), torch.zeros(1)]}, "float32 or float64"),
        ({"rows": [0, 1]}, r"rows\[1\] is not a row"),
        ({"settings": settings_of(["plain"])[:, 1:]}, "settings must be"),
        ({"copies": [torch.zeros(2, 1).half(), torch.zeros(1).half()]}, "layout of weights"),
    ],
    ids=str,
)
def test_what_would_be_unsafe_memory_access_is_refused(
    change: dict[str, Any], message: str
) -> None:
    arguments = worked_example() | change
    before = [w.clone() for w in arguments["weights"]]
    with pytest.raises(RuntimeError, match=message):
        STEP(**arguments)
    assert all(torch.equal(w, b) for w, b in zip(arguments["weights"], before, strict=True))
