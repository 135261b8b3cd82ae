"""The longer experiments behind the claims: `python -m bench.evidence [--only NAME ...]`.

Each is bounded in time, prints what it found and appends rows to bench/results. One that cannot run
here says why and is skipped; one that fails does not stop the others.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import (
    aswl_evidence,
    cases,
    compact_evidence,
    dirichlet_evidence,
    gsm_evidence,
    inference,
    prospr_evidence,
    results,
    sdprun_evidence,
    sdprun_limit_evidence,
    selection_evidence,
    suite_evidence,
)
from .experiment import Fact, SkippedError
from .run import run_case, table

# What it is about, and what measures it: facts are recorded under the experiment's name, rows of
# other kinds it stores by itself.
Experiment = tuple[str, Callable[[], Iterable[Fact] | None]]


def record(experiment: str, subject: str, quantity: str, value: Any, unit: str) -> None:
    """Prints and stores one figure."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    threads = torch.get_num_threads()
    print(f"  {subject}: {quantity} {text} {unit}".rstrip() + f" (threads: {threads})", flush=True)
    row = {
        **results.environment("cpu"),
        "threads": threads,
        "experiment": experiment,
        "subject": subject,
        "quantity": quantity,
        "value": text,
        "unit": unit,
    }
    results.append_facts([row], "cpu")


def speed(pattern: str) -> None:
    """The cases of a glob, with 1 and 2 threads."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for case in cases.matching(pattern, "cpu"):
            rows, interrupted = run_case(case, rounds=21, budget=60)
            if rows:
                print(table(rows), flush=True)
                results.append_timings(rows, "cpu")
            if interrupted:
                raise KeyboardInterrupt


def picture(name: str) -> Path:
    path = results.ROOT / "build" / name
    path.parent.mkdir(exist_ok=True)
    return path


def sdprun_teacher() -> Iterator[Fact]:
    path = picture("sdprun_valley.png")
    yield from sdprun_evidence.teacher(path)
    print(f"  the loss between solutions: {path.relative_to(results.ROOT)}")


def sparse_inference() -> None:
    path = picture("sparse_inference.png")
    over = ["--sparsity", "0.5", "0.6", "0.7", "0.8", "0.9", "0.95", "--threads", "1", "2"]
    where = ["--batch", "1", "16", "--save", "--layers", "--picture", str(path)]
    if inference.main([*over, *where]):
        raise KeyboardInterrupt


EXPERIMENTS: dict[str, Experiment] = {
    "selection_speed": (
        "Every selection case against its rivals, with 1 and 2 threads.",
        partial(speed, "select_*/resnet50/*"),
    ),
    "gsm_speed": (
        "The GSM step beside torch's fused SGD and the eager method, and its fixed cost.",
        partial(speed, "gsm_step/[re]*/*"),  # resnet50, elements161
    ),
    "gsm_digits": (
        "GSM on the digits: accuracy after zeroing at 10x, 20x and 40x, and in blocks; 3 seeds.",
        gsm_evidence.measure,
    ),
    "sdprun_speed": (
        "The SDprun step beside torch's fused momentum SGD and the method in eager PyTorch.",
        partial(speed, "sdprun_step.*/resnet50/*"),
    ),
    "sdprun_limit": (
        "SDprun ends where its theory says, on singular quadratics.",
        sdprun_limit_evidence.measure,
    ),
    "sdprun_teacher": (
        "A student of 64 units: units kept and accuracy of each setting, 5 seeds, and the "
        "barriers.",
        sdprun_teacher,
    ),
    "compaction": (
        "Six architectures without half of their channels: outputs, parameters, file, latency.",
        compact_evidence.measure,
    ),
    "prospr_digits": (
        "ProsPr and its rivals at 98% on the digits, 12 seeds.",
        prospr_evidence.measure,
    ),
    "prospr_memory": (
        "Peak memory of ProsPr on ResNet-20 with 1, 3 and 6 inner steps.",
        prospr_evidence.measure_memory,
    ),
    "dirichlet_planted": (
        "Dirichlet ranks of 32 units of which 8 are read: how many of these come first, 8 seeds.",
        dirichlet_evidence.planted,
    ),
    "dirichlet_digits": (
        "Dirichlet pruning of a VGG and a ResNet on the digits beside other rankings, 3 seeds.",
        dirichlet_evidence.measure,
    ),
    "aswl_teacher": (
        "ASWL, dense SGD and one-shot magnitude at 80%, 5 seeds: accuracy, and how near the "
        "target.",
        lambda: aswl_evidence.teacher(picture("aswl_sparsities.png")),
    ),
    "aswl_speed": (
        "The ASWL step beside torch's fused SGD and the method in eager PyTorch.",
        partial(speed, "aswl_step/*"),
    ),
    "masked_sgd_speed": (
        "The masked step beside torch's fused SGD and SGD times masks.",
        partial(speed, "masked_sgd_step/resnet50/*"),
    ),
    "sparse_inference": (
        "ResNet-50 with random zeros beside dense engines, over the sparsity, and layer by layer.",
        sparse_inference,
    ),
    "selection_scaling": (
        "How well 2 threads serve us, over how well they serve the bare read, in the same rounds.",
        selection_evidence.scaling,
    ),
    "selection_memory": (
        "Peak extra resident memory of our calls, and of the concatenating rivals for comparison.",
        selection_evidence.peak_memory,
    ),
    "beyond_2_to_31_elements": (
        "One fp16 tensor of more than 2^31 elements; the last kept tie lies beyond 2^31.",
        selection_evidence.beyond_2_to_31_elements,
    ),
    "newer_torch": (
        "The CPU library as built, not rebuilt, passes the operator tests under a newer torch.",
        suite_evidence.newer_torch,
    ),
    "mutants": (
        "Every barrier, fence, atomic and bounds check taken out of the CUDA kernels is noticed.",
        suite_evidence.mutants,
    ),
}


def run(names: Sequence[str], experiments: dict[str, Experiment] = EXPERIMENTS) -> int:
    """The number of failed experiments."""
    failed = []
    for name in names:
        about, measure = experiments[name]
        print(f"{name}: {about}", flush=True)
        try:
            for fact in measure() or ():
                record(name, *fact)
        except SkippedError as why:
            print(f"  skipped: {why}", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "no experiment failed")
    return len(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    try:
        return 1 if run(parser.parse_args(arguments).only) else 0
    except KeyboardInterrupt:
        print("interrupted; rows measured until here are in the results", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
