"""Peak extra resident memory of one call, each in a process of its own: `python -m bench.memory`.

The process makes and touches the inputs, warms up on the tiny twin of the case, gives free heap
back, resets the kernel's high-water mark, makes one call and reads the mark again.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import cases, results
from .case import OURS, Case

DEFAULT = "select_*/resnet50/*"
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MIB = 2**20


def status_bytes(field: str) -> int:
    """VmHWM (the peak) or VmRSS (now)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def reset_peak() -> bool:
    """Sets the peak to what is resident now, where the kernel allows it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def return_free_heap() -> None:
    """Otherwise the call could live in freed pages that are still counted as resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def warm_up(case: Case, candidate: str) -> None:
    """Loads code and starts threads; nothing of it belongs to a call."""
    torch.ones(1 << 20).sum()  # large enough to start torch's threads
    family, _, _ = case.name.split("/")
    tiny = cases.all_cases()[f"{family}/tiny/{case.name.rsplit('/', 1)[1]}"]
    inputs = tiny.make(torch.device("cpu"), 1)
    for _ in range(2):
        tiny.candidates("cpu")[candidate](inputs)()


def extra_of(call: Callable[[], object]) -> tuple[int, bool]:
    """(bytes, exact): without a reset the mark of earlier work may hide the call's."""
    return_free_heap()
    exact = reset_peak()
    before = status_bytes("VmRSS" if exact else "VmHWM")
    call()
    return max(status_bytes("VmHWM") - before, 0), exact


def measure_here(case: Case, candidate: str) -> dict[str, Any]:
    """What the child process does."""
    inputs = case.make(torch.device("cpu"), 0)
    call = case.candidates("cpu")[candidate](inputs)
    warm_up(case, candidate)
    extra, exact = extra_of(call)
    inputs_size = sum(t.nbytes for t in case.reads(inputs))
    return {"extra": extra, "inputs": inputs_size, "exact": exact}


def measure(case: Case, candidate: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.memory", "--child", case.name, candidate]
    done = subprocess.run(
        [*command, "--threads", str(threads)],
        cwd=results.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"{case.name}, {candidate}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def facts(case: Case, candidate: str, threads: int) -> list[dict[str, Any]]:
    found = measure(case, candidate, threads)
    common = {
        **results.environment("cpu"),
        "threads": threads,
        "experiment": "memory",
        "subject": f"{case.name} {candidate}",
    }
    quantity = "peak extra resident memory" + ("" if found["exact"] else " (lower bound)")
    return [
        {**common, "quantity": quantity, "value": f"{found['extra'] / MIB:.3f}", "unit": "MiB"},
        {
            **common,
            "quantity": "the same, of the inputs",
            "value": f"{100 * found['extra'] / found['inputs']:.3f}",
            "unit": "%",
        },
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--case", metavar="GLOB", default=DEFAULT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rivals", action="store_true", help="measure the rivals too")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "CANDIDATE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.child:
        name, candidate = options.child
        print(json.dumps(measure_here(cases.all_cases()[name], candidate)))
        return 0
    for case in cases.matching(options.case, "cpu"):
        for candidate in case.candidates("cpu") if options.rivals else [OURS]:
            rows = facts(case, candidate, options.threads)
            print("; ".join(f"{r['quantity']} {r['value']} {r['unit']}" for r in rows), end="  ")
            print(rows[0]["subject"], flush=True)
            if options.save:
                results.append_facts(rows, "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
