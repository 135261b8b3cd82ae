"""The longer experiments behind the claims: `python -m bench.evidence [--only NAME ...]`.

Each is bounded in time, prints what it found and appends rows to bench/results. One that cannot run
here says why and is skipped; one that fails does not stop the others.
"""

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastprune as fp

from . import (
    aswl_evidence,
    cases,
    compact_evidence,
    dirichlet_evidence,
    floor,
    gsm_evidence,
    inference,
    memory,
    prospr_evidence,
    results,
    sdprun_evidence,
    timing,
)
from .case import OURS, Case
from .gpu_check import Command, run_command
from .run import SEED, checked, run_case, table

SELECTION = "select_threshold/resnet50/fp32"


class SkippedError(Exception):
    """Why an experiment cannot run here."""


def fact(experiment: str, subject: str, quantity: str, value: Any, unit: str = "") -> None:
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


def selection_speed() -> None:
    """Every selection case against its rivals, with 1 and 2 threads."""
    measure_speed("select_*/resnet50/*")


def gsm_speed() -> None:
    """The GSM step beside torch's fused SGD and the eager method, and its fixed cost."""
    measure_speed("gsm_step/[re]*/*")  # resnet50, elements161


def gsm_digits() -> None:
    """GSM on the digits: accuracy after zeroing at 10x, 20x and 40x, and in blocks; 3 seeds."""
    record("gsm_digits", gsm_evidence.measure())


def sdprun_speed() -> None:
    """The SDprun step beside torch's fused momentum SGD and the method in eager PyTorch."""
    measure_speed("sdprun_step.*/resnet50/*")


def sdprun_limit() -> None:
    """SDprun ends where its theory says, on singular quadratics."""
    record("sdprun_limit", sdprun_evidence.limit())


def sdprun_teacher() -> None:
    """A student of 64 units: units kept and accuracy of each setting, 5 seeds, and the barriers."""
    picture = results.ROOT / "build" / "sdprun_valley.png"
    picture.parent.mkdir(exist_ok=True)
    record("sdprun_teacher", sdprun_evidence.teacher(picture))
    print(f"  the loss between solutions: {picture.relative_to(results.ROOT)}")


def compaction() -> None:
    """Six architectures without half of their channels: outputs, parameters, file, latency."""
    record("compaction", compact_evidence.measure())


def prospr_digits() -> None:
    """ProsPr and its rivals at 98% on the digits, 12 seeds."""
    record("prospr_digits", prospr_evidence.measure())


def prospr_memory() -> None:
    """Peak memory of ProsPr on ResNet-20 with 1, 3 and 6 inner steps."""
    record("prospr_memory", prospr_evidence.measure_memory())


def dirichlet_planted() -> None:
    """Dirichlet ranks of 32 units of which 8 are read: how many of these come first, 8 seeds."""
    record("dirichlet_planted", dirichlet_evidence.planted())


def dirichlet_digits() -> None:
    """Dirichlet pruning of a VGG and a ResNet on the digits beside other rankings, 3 seeds."""
    record("dirichlet_digits", dirichlet_evidence.measure())


def aswl_teacher() -> None:
    """ASWL, dense SGD and one-shot magnitude at 80%, 5 seeds: accuracy, and how near the target."""
    picture = results.ROOT / "build" / "aswl_sparsities.png"
    picture.parent.mkdir(exist_ok=True)
    record("aswl_teacher", aswl_evidence.teacher(picture))


def aswl_speed() -> None:
    """The ASWL step beside torch's fused SGD and the method in eager PyTorch."""
    measure_speed("aswl_step/*")


def masked_sgd_speed() -> None:
    """The masked step beside torch's fused SGD and SGD times masks."""
    measure_speed("masked_sgd_step/resnet50/*")


def sparse_inference() -> None:
    """ResNet-50 with random zeros beside dense engines, over the sparsity, and layer by layer."""
    picture = results.ROOT / "build" / "sparse_inference.png"
    picture.parent.mkdir(exist_ok=True)
    over = ["--sparsity", "0.5", "0.6", "0.7", "0.8", "0.9", "0.95", "--threads", "1", "2"]
    where = ["--batch", "1", "16", "--save", "--layers", "--picture", str(picture)]
    if inference.main([*over, *where]):
        raise KeyboardInterrupt


def record(experiment: str, facts: Iterable[tuple[str, str, Any, str]]) -> None:
    for subject, quantity, value, unit in facts:
        fact(experiment, subject, quantity, value, unit)


def measure_speed(pattern: str) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for case in cases.matching(pattern, "cpu"):
            rows, interrupted = run_case(case, rounds=21, budget=60)
            if rows:
                print(table(rows), flush=True)
                results.append_timings(rows, "cpu")
            if interrupted:
                raise KeyboardInterrupt


def selection_scaling() -> None:
    """How well 2 threads serve us, over how well they serve the bare read, in the same rounds."""
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
    fact("selection_scaling", SELECTION, "speed with 2 threads over 1", ours, "x")
    fact("selection_scaling", "read pass", "speed with 2 threads over 1", read, "x")
    fact("selection_scaling", SELECTION, "scaling relative to the read pass", ours / read, "x")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ratio = timing.ratio_by_round(samples[f"ours {threads}"], samples[f"read {threads}"])
        fact("selection_scaling", SELECTION, "time over the read pass", ratio, "x")


def scaling_candidates(case: Case, inputs: Any) -> dict[str, timing.Timed]:
    read = floor.read_pass(case.reads(inputs))
    if read is None:
        raise SkippedError("the read pass needs a C++ compiler")
    alone = Case(**{**vars(case), "rivals": {}})
    call = checked(alone, inputs, "cpu", "wall")[OURS].call
    return {
        f"{name} {threads}": timing.on_cpu(function)
        for threads in (1, 2)
        for name, function in (("ours", call), ("read", read))
    }


def selection_memory() -> None:
    """Peak extra resident memory of our calls, and of the concatenating rivals for comparison."""
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


def beyond_2_to_31_elements() -> None:
    """One fp16 tensor of more than 2^31 elements; the last kept tie lies beyond 2^31."""
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
    fact("beyond_2_to_31_elements", subject, "elements kept, as asked", kept)
    fact("beyond_2_to_31_elements", subject, "tie_end, as expected", last_tie)


def tail_mask(size: int, value: int, tie_end: int) -> torch.Tensor:
    positions = torch.arange(size - PERIOD * 8, size)
    values = positions % PERIOD
    return (values > value) | ((values == value) & (positions < tie_end))


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


NEWER_TORCH = "2.13.0"
NEWER_FOLDER = results.ROOT / ".venv-torch213"
NEWER_PACKAGES = ("numpy", "safetensors", "pytest", "hypothesis", "pytest-timeout")


def newer_torch() -> None:
    """The CPU library as built, not rebuilt, passes the operator tests under a newer torch."""
    library = Path(fp.__file__).with_name("_cpu.so")
    if not library.exists():
        raise SkippedError("there is no built _cpu.so")
    python = newer_python()
    probe = (
        "import torch, fastprune as fp; i = fp.build_info(); print(torch.__version__, "
        "i.operators['select_threshold']['CPU'])"
    )
    code, said = run_command(Command([python, "-c", probe]), 120)
    version, _, served = (said.strip() or "nothing").splitlines()[-1].partition(" ")
    if code or not version.startswith(NEWER_TORCH) or served != "C++":
        raise AssertionError(f"the library does not load under torch {NEWER_TORCH}")
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops"]
    code, said = run_command(Command(tests), 900)
    counts = (said.strip() or "no output").splitlines()[-1].strip("= ").split(" in ")[0]
    if code != 0:
        raise AssertionError(f"tests/ops under torch {version}: {counts}")
    built = fp.build_info().host.get("built against torch", torch.__version__)
    subject = f"_cpu.so built with torch {built} under torch {version}"
    fact("newer_torch", subject, "tests/ops", counts)


def newer_python() -> str:
    """The interpreter of a second environment, made once and kept."""
    python = NEWER_FOLDER / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", f"torch=={NEWER_TORCH}", *NEWER_PACKAGES]
    if not python.exists():
        print(f"  creating {NEWER_FOLDER.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(NEWER_FOLDER)], check=True)
        (NEWER_FOLDER / ".gitignore").write_text("*\n")
    done = subprocess.run(install, capture_output=True, text=True, timeout=1500)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise SkippedError(f"torch {NEWER_TORCH} cannot be installed here (offline?): {last}")
    return str(python)


def mutants() -> None:
    """Every barrier, fence, atomic and bounds check taken out of the CUDA kernels is noticed."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "evidence", "tests/csrc/test_simulator.py"]
    code, said = run_command(Command(tests), 3000)
    counts = (said.strip() or "no output").splitlines()[-1].strip("= ").split(" in ")[0]
    if code != 0:
        raise AssertionError(f"mutants that no sanitizer noticed: {counts}")
    fact("mutants", "csrc/cuda under ASan, UBSan and TSan", "mutants that fail", counts)


EXPERIMENTS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        selection_speed,
        gsm_speed,
        gsm_digits,
        sdprun_speed,
        sdprun_limit,
        sdprun_teacher,
        compaction,
        prospr_digits,
        prospr_memory,
        dirichlet_planted,
        dirichlet_digits,
        aswl_teacher,
        aswl_speed,
        masked_sgd_speed,
        sparse_inference,
        selection_scaling,
        selection_memory,
        beyond_2_to_31_elements,
        newer_torch,
        mutants,
    )
}


def run(names: Sequence[str], experiments: dict[str, Callable[[], None]] = EXPERIMENTS) -> int:
    """The number of failed experiments."""
    failed = []
    for name in names:
        lines = (experiments[name].__doc__ or "").splitlines()
        print(f"{name}: {lines[0] if lines else ''}", flush=True)
        try:
            experiments[name]()
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
