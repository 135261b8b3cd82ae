"""Every Triton kernel compiles for every GPU we build for, at the cost that is written down."""

import pytest

triton = pytest.importorskip("triton")

import aot  # noqa: E402

# Other versions of the assembler allocate a little differently; a change of the kernel shows.
REGISTER_TOLERANCE = 8

Measured = dict[str, tuple[dict[str, aot.Resources], list[str]]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    return aot.measure_all()


def test_the_table_has_exactly_the_cases() -> None:
    names = [case.name for case in aot.CASES]
    assert len(set(names)) == len(names)
    assert sorted(aot.read_table()) == sorted(names)


def test_nothing_spills(measured: Measured) -> None:
    spills = {
        (name, architecture): used.spills
        for name, (row, _) in measured.items()
        for architecture, used in row.items()
        if used.spills
    }
    assert spills == {}


def test_registers_and_shared_memory_are_those_of_the_table(measured: Measured) -> None:
    differences = []
    for name, row in aot.read_table().items():
        for architecture, expected in row.items():
            used = measured[name][0][architecture]
            moved = abs(used.registers - expected.registers) > REGISTER_TOLERANCE
            if moved or used.shared != expected.shared:
                differences.append(f"{name} on {architecture}: {used}, table: {expected}")
    assert not differences, "\n".join([*differences, "if meant: python -m tests.triton.aot"])


def test_every_operation_rounds_once_and_keeps_denormals(measured: Measured) -> None:
    assert {name: inexact for name, (_, inexact) in measured.items() if inexact} == {}


def test_contraction_would_be_seen() -> None:
    case = next(c for c in aot.CASES if c.name == "_block_scores_kernel[saliency, fp32]")
    fused = aot.with_options(case, enable_fp_fusion=True)
    assert aot.inexact_instructions(aot.compile_case(fused, 80))


def test_a_spill_would_be_seen() -> None:
    case = next(c for c in aot.CASES if c.name == "_mask_kernel[magnitude, fp32]")
    starved = aot.with_options(case, maxnreg=32)
    assert aot.resources(aot.compile_case(starved, 80)).spills > 0
