"""Compiles every Triton kernel ahead of time, for GPUs that need not be there, and reads its cost.

A case is a kernel with the types of its arguments, its compile-time constants and its launch
options. Kernels of later operators join by adding their cases to `CASES`.

    python -m tests.triton.aot

measures every case and writes the table that the test guards. It needs no GPU. Look at the
differences before you commit them: registers bound how many programs share a multiprocessor, and
a spill is traffic that no count of bytes has in it.
"""

import json
import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastprune.ops.triton_kernels import sdprun, select, switch

TABLE = Path(__file__).with_name("triton_resources.json")
ARCHITECTURES = (80, 90, 100)
NUM_WORKERS = 2  # one compiles while the other waits for the assembler

Types = dict[str, str]
Constants = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One configuration of one kernel."""

    kernel: Any
    label: str
    types: Types
    constants: Constants
    options: dict[str, Any]
    fused: bool = False  # has fused multiply-adds that are meant

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__}[{self.label}]"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one architecture: registers of a thread, bytes of memory."""

    registers: int
    spills: int
    shared: int


def int64s(*names: str) -> Types:
    """Pointers to the int64 tensors that tables and counts are."""
    return dict.fromkeys(names, "*i64")


def _select_cases() -> list[Case]:
    scores = ("value", "magnitude", "saliency")
    chunked = [
        case
        for score in scores
        for storage in select.STORAGE.values()
        for case in _select_chunk_cases(storage, score)
    ]
    thresholds = [
        Case(
            select._threshold_kernel,
            f"{score}, {dtype}",
            {**int64s("keys"), "threshold": f"*{dtype}"},
            {"SCORE": score},
            select.OPTIONS,
        )
        for score in scores
        for dtype in ("fp32", "fp64")
    ]
    picks = [
        Case(
            select._pick_kernel,
            f"{replicas} replicas",
            {**int64s("histogram", "prefixes", "remaining", "num_equal"), "digit_bits": "i32"},
            {"BINS": select.BINS, "REPLICAS": replicas},
            select.PICK_OPTIONS,
        )
        for replicas in (select.GLOBAL_REPLICAS, 1)
    ]
    return [*picks, *thresholds, *chunked]


def _select_chunk_cases(storage: Any, score: str) -> list[Case]:
    wide = "fp64" if storage.name == "fp64" else "fp32"
    ties = int64s("keys", "num_ties", "num_equal", "chunk_ties")
    digit = dict.fromkeys(("shift", "digit_bits", "first_digit"), "i32")
    rows: list[tuple[Any, Types, Constants, dict[str, Any]]] = [
        (
            select._histogram_kernel,
            {**int64s("prefixes", "histogram"), "non_finite": "*i32", **digit},
            {"BINS": select.BINS, "REPLICAS": select.GLOBAL_REPLICAS},
            select.OPTIONS,
        ),
        (select._count_ties_kernel, ties, {}, select.OPTIONS),
        (
            select._locate_tie_kernel,
            {**ties, **int64s("ties_through", "tie_end")},
            {},
            select.OPTIONS,
        ),
        (
            select._mask_kernel,
            {"threshold": f"*{wide}", **int64s("tie_end")},
            {},
            select.OPTIONS,
        ),
        (
            select._block_scores_kernel,
            {},
            {"BLOCK_OUTPUTS": 4, "BLOCK_INPUTS": 4, "CHUNK": select.BLOCK_CHUNK},
            select.OPTIONS,
        ),
    ]
    table = int64s("tensors", "chunks", "order")
    common = {"STORAGE": storage, "SCORE": score, "CHUNK": select.CHUNK}
    label = f"{score}, {storage.name}"
    return [
        Case(kernel, label, {**table, **types}, {**common, **constants}, options)
        for kernel, types, constants, options in rows
    ]


def _sdprun_cases() -> list[Case]:
    """Accumulator, gradient and weight."""
    kinds = [("fp32", "fp32", "fp32"), ("fp32", "fp32", "bf16"), ("fp32", "bf16", "bf16"),
             ("fp32", "fp16", "fp16"), ("fp64", "fp64", "fp64")]  # fmt: skip
    names = {dtype.name: dtype for dtype in select.STORAGE.values()}
    numbers = dict.fromkeys(("norms", "progress", "settings"), "*fp64")
    flags = dict.fromkeys(("grad_scale", "found_inf"), "*fp32")
    return [
        Case(
            sdprun._shrink_rows_kernel,
            ", ".join(kind),
            {**int64s("tensors", "programs"), **numbers, **flags},
            {
                **dict(zip(("WIDE", "GRADIENT", "WEIGHT"), map(names.get, kind), strict=True)),
                "ROWS": sdprun.ROWS,
            },
            sdprun.OPTIONS,
            fused=True,
        )
        for kind in kinds
    ]


def _switch_cases() -> list[Case]:
    """Of images and of short planes; wide and narrow channels-last."""
    tiles: list[tuple[Any, Types, list[tuple[int, Constants]]]] = [
        (
            switch._rows_kernel,
            dict.fromkeys(("num_rows", "num_scales", "width"), "i32"),
            [(width, {}) for width in (switch.TILE, 64)],
        ),
        (
            switch._columns_kernel,
            dict.fromkeys(("num_rows", "width"), "i32"),
            [(width, {"STEPS": switch.STEPS}) for width in (switch.WIDEST, 64)],
        ),
    ]
    return [
        Case(
            kernel,
            f"{dtype}, {width} wide{', backward' if backward else ''}",
            {
                **dict.fromkeys(("source", "input", "result"), f"*{dtype}"),
                **dict.fromkeys(("scale", "sums"), "*fp64" if dtype == "fp64" else "*fp32"),
                **sizes,
            },
            {
                **steps,
                "ROWS": switch.TILE // width,
                "WIDTH": width,
                "BACKWARD": backward,
            },
            switch.OPTIONS,
        )
        for kernel, sizes, shapes in tiles
        for width, steps in shapes
        for dtype in (storage.name for storage in select.STORAGE.values())
        for backward in (False, True)
    ]


CASES: list[Case] = [*_select_cases(), *_sdprun_cases(), *_switch_cases()]


def compile_case(case: Case, architecture: int) -> Any:
    types = {**case.types, **dict.fromkeys(case.constants, "constexpr")}
    in_order = {name: types[name] for name in case.kernel.arg_names}
    source = ASTSource(case.kernel, in_order, constexprs=case.constants)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=case.options)


def resources(compiled: Any) -> Resources:
    """Read from the machine code, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = re.search(rf"Function {compiled.metadata.name}:\s*(.*)", usage)
    assert line, usage
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line[1])}
    return Resources(
        registers=numbers["REG"],
        # Kernels declare no local arrays: whatever lies on the stack did not fit in registers.
        spills=numbers["STACK"] + numbers["LOCAL"],
        shared=numbers["SHARED"] + compiled.metadata.shared,
    )


def inexact_instructions(compiled: Any) -> list[str]:
    """Floating-point instructions that may be merged into one rounding, or that flush denormals.

    An instruction with a rounding modifier (`mul.rn.f32`) is never contracted by the assembler.
    """
    ptx = compiled.asm["ptx"]
    return re.findall(r"\bfma\.\S+|\b(?:mul|add|sub)\.(?:ftz\.)?f\d+|\b\w+[\w.]*\.ftz\.\S+", ptx)


def measure(case: Case) -> tuple[dict[str, Resources], list[str]]:
    """Resources by architecture, and all inexact instructions."""
    compiled = {f"sm_{a}": compile_case(case, a) for a in ARCHITECTURES}
    inexact = [i for kernel in compiled.values() for i in inexact_instructions(kernel)]
    if case.fused:
        inexact = [i for i in inexact if not i.startswith("fma.rn.")]
    return {name: resources(kernel) for name, kernel in compiled.items()}, inexact


def measure_all() -> dict[str, tuple[dict[str, Resources], list[str]]]:
    """In processes: Python 3.11 parses wrongly in several threads (cpython issue 106905)."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    with ProcessPoolExecutor(NUM_WORKERS, mp_context=spawn) as pool:
        measured = list(pool.map(_measure_numbered, range(len(CASES))))
    return {case.name: row for case, row in zip(CASES, measured, strict=True)}


def _measure_numbered(number: int) -> tuple[dict[str, Resources], list[str]]:
    return measure(CASES[number])  # a case itself holds a kernel and cannot be sent


def with_options(case: Case, **options: Any) -> Case:
    return replace(case, options={**case.options, **options})


def read_table() -> dict[str, dict[str, Resources]]:
    table = json.loads(TABLE.read_text())
    return {
        name: {architecture: Resources(*numbers) for architecture, numbers in row.items()}
        for name, row in table.items()
    }


def write_table() -> None:
    """One line a case: architecture -> [registers, spilled bytes, shared bytes]."""
    lines = []
    for name, (row, _) in measure_all().items():
        numbers = {a: [used.registers, used.spills, used.shared] for a, used in row.items()}
        lines.append(f"  {json.dumps(name)}: {json.dumps(numbers)}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_table()
