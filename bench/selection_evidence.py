"""Exact selection: how it scales over threads, its memory, and more than 2^31 elements."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastprune as fp

from . import cases, floor, memory, results, timing
from .case import OURS, Case
from .experiment import Fact, SkippedError
from .run import SEED, checked

SELECTION = "select_threshold/resnet50/fp32"


def scaling() -> Iterator[Fact]:
    case = cases.all_cases()[SELECTION]
    inputs = case.make(torch.device("cpu"), SEED)
    measured = timing.measure(
        scaling_candidates(case, inputs),
        rounds=61,
        budget=60,
        progress=timing.show_progress(f"{case.name} scaling"),
        before=lambda name: torch.set_num_threads(int(name[-1])),
    )
    if measured.interrupted:
        raise KeyboardInterrupt
    samples = measured.seconds
    ours = timing.ratio_by_round(samples["ours 1"], samples["ours 2"])
    read = timing.ratio_by_round(samples["read 1"], samples["read 2"])
    torch.set_num_threads(2)
    yield SELECTION, "speed with 2 threads over 1", ours, "x"
    yield "read pass", "speed with 2 threads over 1", read, "x"
    yield SELECTION, "scaling relative to the read pass", ours / read, "x"
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ratio = timing.ratio_by_round(samples[f"ours {threads}"], samples[f"read {threads}"])
        yield SELECTION, "time over the read pass", ratio, "x"


def scaling_candidates(case: Case, inputs: Any) -> dict[str, timing.Timed]:
    read = floor.read_pass(case.reads(inputs))
    if read is None:
        raise SkippedError("the read pass needs a C++ compiler")
    alone = replace(case, rivals={})
    call = checked(alone, inputs, "cpu", "wall")[OURS].call
    return {
        f"{name} {threads}": timing.on_cpu(function)
        for threads in (1, 2)
        for name, function in (("ours", call), ("read", read))
    }


def peak_memory() -> None:
    for threads in (1, 2):
        for case in cases.matching(memory.DEFAULT, "cpu"):
            with_rivals = case.name == SELECTION and threads == 1
            for candidate in case.candidates("cpu") if with_rivals else [OURS]:
                rows = memory.facts(case, candidate, threads)
                for row in rows:
                    print(f"  {row['subject']}: {row['quantity']} {row['value']} {row['unit']}")
                results.append_facts(rows, "cpu")


# Values 0..1023 in turn: exact in fp16, every count and position known without another selection.
PERIOD = 1024
BEYOND = 2**31 + 4097


def beyond_2_to_31_elements() -> list[Fact]:
    if results.implementation("select_threshold", "cpu") == "reference":
        raise SkippedError("the reference needs 60 GB here; build the native library")
    free = available_bytes()
    if free < 12e9:
        raise SkippedError(f"needs 12 GB of free memory, {free / 1e9:.1f} GB are free")
    tensor = torch.empty(BEYOND, dtype=torch.float16)
    pattern = torch.arange(PERIOD, dtype=torch.float16)
    whole = BEYOND // PERIOD * PERIOD
    tensor[:whole].view(-1, PERIOD).copy_(pattern)
    tensor[whole:] = pattern[: BEYOND - whole]
    value = PERIOD - 3  # two values above it, and not in the tail
    repeats = BEYOND // PERIOD
    num_kept = 3 * repeats - 1  # all but the last tie
    last_tie = (repeats - 1) * PERIOD + value
    chosen = fp.global_topk([tensor], num_kept)
    expected = (float(value), repeats - 1, last_tie)
    got = tuple(field.item() for field in chosen[:3])
    if got != expected or last_tie < 2**31:
        raise AssertionError(f"(threshold, num_ties, tie_end) is {got}, expected {expected}")
    (mask,) = fp.global_topk_masks([tensor], num_kept)
    kept = sum(int(part.sum()) for part in mask.split(1 << 28))
    tail_right = torch.equal(mask[-PERIOD * 8 :], tail_mask(BEYOND, value, last_tie))
    if kept != num_kept or not tail_right:
        raise AssertionError(f"{kept} elements kept, expected {num_kept}; tail {tail_right}")
    subject = f"one fp16 tensor of {BEYOND} elements"
    return [
        (subject, "elements kept, as asked", kept, ""),
        (subject, "tie_end, as expected", last_tie, ""),
    ]


def tail_mask(size: int, value: int, tie_end: int) -> torch.Tensor:
    positions = torch.arange(size - PERIOD * 8, size)
    values = positions % PERIOD
    return (values > value) | ((values == value) & (positions < tie_end))


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
