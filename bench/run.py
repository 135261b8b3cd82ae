"""Measures cases against their rivals: `python -m bench.run --case 'select_*/resnet50/*' --save`.

A case is timed only when our answer, and every rival's, is the expected one.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import cases, floor, results, timing
from .case import OURS, Case, WrongAnswerError
from .timing import Samples, Timed

SEED = 0
Row = dict[str, Any]


def timed(call: Any, device: str, clock: timing.Clock) -> Timed:
    return timing.on_cuda(call) if device == "cuda" else timing.on_cpu(call, clock)


def checked(case: Case, inputs: Any, device: str, clock: timing.Clock) -> dict[str, Timed]:
    """All candidates, each after its answer was right; a graph's answer is that of a replay."""
    expected = case.expect(inputs)
    ready = {}
    for name, prepare in case.candidates(device).items():
        candidate = timed(prepare(inputs), device, clock)
        try:
            case.check(expected, candidate.call())
        except WrongAnswerError as error:
            raise WrongAnswerError(
                f"{case.name}: {name} is wrong, so nothing is timed: {error}"
            ) from None
        ready[name] = candidate
    return ready


def floors(
    case: Case, inputs: Any, device: str, clock: timing.Clock
) -> dict[str, tuple[Timed, int]]:
    """What the memory allows, measured in the same rounds: (timed, bytes) by name."""
    read = case.reads(inputs)
    size = sum(t.nbytes for t in read)
    if device == "cuda":
        target = read[0].device
        calls = {"copy": floor.copy_pass(size, target), "torch sum": floor.sum_pass(size, target)}
    else:
        read_pass = floor.read_pass(read)
        calls = {"read pass": read_pass} if read_pass else {}
    return {name: (timed(call, device, clock), size) for name, call in calls.items()}


def rows_of(
    case: Case,
    samples: Samples,
    candidates: Mapping[str, Timed],
    floor_bytes: Mapping[str, int],
    device: str,
) -> list[Row]:
    """One row per candidate. Percent of limit: our bytes per second over the fastest floor's."""
    ours = samples.seconds[OURS]
    median = {name: timing.summary(s).median for name, s in samples.seconds.items()}
    limit = max((size / median[name] for name, size in floor_bytes.items()), default=0.0)
    common = {
        **results.environment(device),
        "threads": torch.get_num_threads(),
        "case": case.name,
        "implementation": results.implementation(case.name.split("/")[0], device),
        "rounds": samples.rounds,
    }
    rows = []
    for name, seconds in samples.seconds.items():
        stats = timing.summary(seconds)
        size = floor_bytes.get(name, case.bytes_moved)
        rows.append(
            {
                **common,
                "candidate": name,
                "role": "floor" if name in floor_bytes else "ours" if name == OURS else "rival",
                "method": candidates[name].method,
                "median_ms": f"{stats.median * 1e3:.5g}",
                "p20_ms": f"{stats.p20 * 1e3:.5g}",
                "p80_ms": f"{stats.p80 * 1e3:.5g}",
                "times_ours": f"{timing.ratio_by_round(seconds, ours):.4g}",
                "times_ours_of_medians": f"{stats.median / median[OURS]:.4g}",
                "gb_per_s": f"{size / stats.median / 1e9:.4g}",
                "percent_of_limit": f"{100 * size / stats.median / limit:.4g}" if limit else "",
                "gflop_per_s": ""
                if name in floor_bytes
                else f"{case.flops / stats.median / 1e9:.4g}",
            }
        )
    return rows


def run_case(
    case: Case,
    device: str = "cpu",
    rounds: int = 21,
    budget: float = 60.0,
    clock: timing.Clock = "wall",
) -> tuple[list[Row], bool]:
    """(rows, interrupted); raises WrongAnswerError before anything is timed."""
    inputs = case.make(torch.device(device), SEED)
    candidates = checked(case, inputs, device, clock)
    limits = floors(case, inputs, device, clock)
    everyone = {**candidates, **{name: candidate for name, (candidate, _) in limits.items()}}
    progress = timing.show_progress(case.name)
    samples = timing.measure(everyone, rounds, budget, progress)
    if not samples.rounds:
        return [], samples.interrupted
    sizes = {name: size for name, (_, size) in limits.items()}
    return rows_of(case, samples, everyone, sizes, device), samples.interrupted


COLUMNS = (
    "candidate",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "times_ours",
    "gb_per_s",
    "percent_of_limit",
)
HEADS = ("candidate", "median ms", "p20", "p80", "x ours*", "GB/s", "% limit")


def table(rows: Sequence[Row]) -> str:
    """One case for the reader: the table, then what it says."""
    first = rows[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    title = (
        f"{first['case']} on {first['device']}, {threads}, {first['rounds']} rounds, "
        f"{first['method']}; served by {first['implementation']}"
    )
    cells = [HEADS, *([str(row[column]) for column in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in cells
    ]
    said = [
        f"ours / {row['candidate']} {1 / float(row['times_ours']):.2f}"
        for row in rows
        if row["role"] == "floor"
    ]
    said += [
        f"{row['candidate']} / ours {float(row['times_ours']):.1f}"
        for row in rows
        if row["role"] == "rival"
    ]
    return "\n".join([title, *lines, f"time ratios*: {'; '.join(said)}", ""])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--case", metavar="GLOB", help="names to run; default: all but */tiny/*")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU only")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--budget", type=float, default=60, help="seconds per case; at least 3 rounds"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=sorted(timing.CLOCKS), default="wall")
    parser.add_argument("--save", action="store_true", help="append rows to the results")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the rows")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    if options.clock == "process" and (options.device == "cuda" or options.threads != [1]):
        parser.error("--clock process adds up all threads: use it with --device cpu --threads 1")
    options.cases = cases.matching(options.case, options.device)
    if not options.cases:
        parser.error(f"no case matches {options.case!r}; --list names them")
    if options.device == "cuda" and not options.list and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(case.name for case in options.cases))
        return 0
    wrong = 0
    for threads in options.threads if options.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for case in options.cases:
            try:
                rows, interrupted = run_case(
                    case, options.device, options.rounds, options.budget, options.clock
                )
            except WrongAnswerError as error:
                print(f"REFUSED {error}\n", flush=True)
                wrong += 1
                continue
            except KeyboardInterrupt:
                rows, interrupted = [], True
            if rows:
                print(table(rows), flush=True)
                if options.save:
                    results.append_timings(rows, options.device, options.results)
            if interrupted:
                print("interrupted; what was measured is above", file=sys.stderr)
                return 130
    print("* medians of the ratios of one round's times")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
