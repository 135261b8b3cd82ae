"""Result rows: where they lie, what every row says about the machine, how they are appended."""

import csv
import functools
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastprune as fp

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).with_name("results")

ENVIRONMENT = ("date", "commit", "device", "cpu", "torch", "triton", "python", "compiler", "isa")
TIMING = (
    *ENVIRONMENT,
    "threads",
    "case",
    "candidate",
    "role",  # ours, rival or floor
    "implementation",  # what served our operators: C++, CUDA C++, reference, ...
    "method",  # wall or process clock, graph replay or events
    "rounds",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "times_ours",  # median over rounds of (this candidate's time / ours)
    "times_ours_of_medians",
    "gb_per_s",
    "percent_of_limit",
    "gflop_per_s",
)
FACT = (*ENVIRONMENT, "threads", "experiment", "subject", "quantity", "value", "unit")


@functools.cache
def cpu_model() -> str:
    """The processor's name; its parts too, since virtual machines hide the model number."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.findall(r"^([^\t:]+?)\s*: *(.*)$", text.split("\n\n")[0], re.M))
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts.get('cpu family', '?')} model {facts.get('model', '?')})"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return cpu_model().split(" (family")[0]


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def commit() -> str:
    """The commit measured; "-dirty" when the working tree (results apart) differs from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **_QUIET).stdout.strip()
        changes = [*git, "status", "--porcelain", "--", ".", ":!bench/results"]
        dirty = subprocess.run(changes, **_QUIET).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if dirty else "")


_QUIET: dict[str, Any] = {"capture_output": True, "text": True, "check": True}


def environment(device: str) -> dict[str, str]:
    host = fp.build_info().host
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "device": device_name(device),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "compiler": host.get("compiler", ""),
        "isa": next((value for key, value in host.items() if "kernels use" in key), ""),
    }


def implementation(operator: str, device: str) -> str:
    """What serves an operator; of one that several operators make up, all of them."""
    served = {n: by[device.upper()] for n, by in fp.build_info().operators.items()}
    return served.get(operator.split(".")[0], "+".join(sorted(set(served.values()))))


def append(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV file; one with other columns is an error, never mixed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ",".join(columns)
    if path.exists():
        with path.open() as file:
            if file.readline().strip() != header:
                raise ValueError(
                    f"{path} has other columns than this version writes; rename it, then run again"
                )
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="raise")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def append_timings(rows: Iterable[Mapping[str, Any]], device: str, folder: Path = FOLDER) -> Path:
    path = folder / f"{slug(device)}.csv"
    append(path, TIMING, rows)
    return path


def append_facts(rows: Iterable[Mapping[str, Any]], device: str, folder: Path = FOLDER) -> Path:
    """Facts are single figures of the longer experiments."""
    path = folder / f"{slug(device)}-evidence.csv"
    append(path, FACT, rows)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
