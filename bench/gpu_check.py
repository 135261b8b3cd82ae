"""The last word of a real GPU: `python -m bench.gpu_check [--stage NAME ...] [--out FILE]`.

Needs no package registry: it uses the interpreter that starts it and builds in place for the GPU it
finds. A stage is a few commands with a time limit, each in its own process, so that one that fails,
hangs or crashes does not stop the others. Every stage fits 10 minutes and can be called alone; a
later call with the same --out replaces the results of its own stages and keeps the rest.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).with_name("results") / "gpu_check.json"
TAIL = 4000  # characters of a command's output that are kept
PASSED, FAILED, TIMEOUT, MISSING = "passed", "failed", "timeout", "missing"


@dataclass(frozen=True)
class Command:
    arguments: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    name: str
    about: str
    limit: float  # seconds for all its commands
    commands: Callable[[argparse.Namespace], list[Command]]
    needs: str = ""  # a program without which the stage cannot run


@dataclass
class Outcome:
    stage: str
    status: str
    seconds: float
    date: str
    returncodes: list[int] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tail: str = ""


# The stages


def build(options: argparse.Namespace) -> list[Command]:
    environment = {"TORCH_CUDA_ARCH_LIST": options.arch, "FASTPRUNE_BUILD": "cuda"}
    return [Command([sys.executable, "setup.py", "build_ext", "--inplace"], environment)]


def tests(_: argparse.Namespace) -> list[Command]:
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4", "--dist", "loadfile"]
    # The interpreter's tests and the ahead-of-time compile checks need no GPU: they run elsewhere.
    return [Command([*command, "tests", "--ignore=tests/triton"])]


def sanitize(_: argparse.Namespace) -> list[Command]:
    """Our own small comparison, not pytest: instrumented kernels run 10 to 100 times slower."""
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has bounds of its own
    sanitizer = ["compute-sanitizer", "--error-exitcode", "99", "--launch-timeout", "60"]
    part = [sys.executable, "-m", "bench.gpu_parts", "operators"]
    return [
        Command([*sanitizer, "--tool", tool, *part], environment)
        for tool in ("memcheck", "racecheck")
    ]


def part(name: str) -> Callable[[argparse.Namespace], list[Command]]:
    return lambda _: [Command([sys.executable, "-m", "bench.gpu_parts", name])]


def bench(options: argparse.Namespace) -> list[Command]:
    folder = str(options.out.resolve().parent)
    run = [sys.executable, "-m", "bench.run", "--device", "cuda", "--rounds", "21"]
    return [Command([*run, "--budget", "40", "--save", "--results", folder])]


STAGES = [
    Stage("build", "builds all native libraries in place for this GPU", 590, build),
    Stage("tests", "the test suite", 590, tests),
    Stage(
        "sanitize", "memcheck and racecheck on the operators", 590, sanitize, "compute-sanitizer"
    ),
    Stage(
        "graphs", "capture and replay equals eager; no host synchronisation", 200, part("graphs")
    ),
    Stage("triton", "the Triton twins against the reference", 500, part("triton")),
    Stage("bench", "selection over 25.6M and 350M elements against the rivals", 590, bench),
]


# Running them


def run_stage(stage: Stage, options: argparse.Namespace) -> Outcome:
    start = time.monotonic()
    outcome = Outcome(stage.name, PASSED, 0.0, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    if stage.needs and not shutil.which(stage.needs):
        outcome.status, outcome.notes = MISSING, [f"{stage.needs} is not on the PATH"]
        return outcome
    output = ""
    for command in stage.commands(options):
        left = stage.limit - (time.monotonic() - start)
        code, text = run_command(command, left)
        output += text
        outcome.returncodes.append(-1 if code is None else code)
        if code is None:
            outcome.status = TIMEOUT
            break
        if code:
            outcome.status = FAILED
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.facts = facts_in(output)
    outcome.notes = notes_in(output)
    outcome.tail = output[-TAIL:]
    return outcome


def run_command(command: Command, limit: float) -> tuple[int | None, str]:
    """(exit status, or None at the time limit; output, which is shown while it comes)."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {
        **inherited,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        **command.environment,
    }
    process = subprocess.Popen(
        command.arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it started ends with it
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(limit, 0.1), stop)
    timer.start()
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print("    " + line, end="", flush=True)
            lines.append(line)
        code = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    return (None if late.is_set() else code), "".join(lines)


def facts_in(output: str) -> list[dict[str, Any]]:
    """The RESULT lines of a stage's own programs."""
    return [json.loads(line) for line in re.findall(r"^RESULT (\{.*\})$", output, re.M)]


def notes_in(output: str) -> list[str]:
    """Lines a reader of the summary wants: skips, failures, sanitizer and pytest totals, ratios."""
    wanted = (
        r"SKIPPED \[|FAILED |ERROR |REFUSED |={5,} .*(ERROR|RACECHECK) SUMMARY|"
        r"\d+ (passed|failed|skipped)|time ratios|AssertionError|\S+ on .* rounds"
    )
    return [
        line.strip()[:300]
        for line in output.splitlines()
        if re.match(wanted, line.strip("= ")) or re.match(wanted, line)
    ]


def missing_packages() -> list[str]:
    """Packages the project's extras name that this interpreter does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project.get("dependencies", [])]
    for extra in project.get("optional-dependencies", {}).values():
        named += extra
    names = sorted({re.split(r"[^\w.-]", requirement)[0] for requirement in named})
    return [name for name in names if name != "fastprune" and not installed(name)]


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


# The result file


def load(path: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """(header, outcomes) of a result file: comment lines, then one JSON object a line."""
    if not path.exists():
        return {}, []
    objects = [json.loads(x) for x in path.read_text().splitlines() if x and not x.startswith("#")]
    return objects[0], [Outcome(**entry) for entry in objects[1:]]


def merged(old: Sequence[Outcome], new: Sequence[Outcome]) -> list[Outcome]:
    """New outcomes replace those of the same stage; the order is that of STAGES."""
    by_name = {outcome.stage: outcome for outcome in [*old, *new]}
    names = [stage.name for stage in STAGES]
    return sorted(
        by_name.values(), key=lambda o: names.index(o.stage) if o.stage in names else len(names)
    )


def save(path: Path, header: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    comments = [f"# {line}" for line in summary(header, outcomes).splitlines()]
    objects = [json.dumps(header), *(json.dumps(asdict(outcome)) for outcome in outcomes)]
    temporary = path.with_suffix(".part")  # a kill in the middle leaves the old file
    temporary.write_text("\n".join([*comments, *objects, ""]))
    temporary.replace(path)


def summary(header: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    lines = [f"{key}: {value}" for key, value in header.items() if value]
    for outcome in outcomes:
        lines.append(f"{outcome.stage:<9} {outcome.status:<8} {outcome.seconds:7.1f} s")
        lines += [f"    {note}" for note in outcome.notes]
    return "\n".join(lines)


def header() -> dict[str, Any]:
    import torch

    from .results import environment

    return {**environment("cuda"), "cuda": torch.version.cuda, "missing": missing_packages()}


def run_stages(
    stages: Sequence[Stage], options: argparse.Namespace, facts: Mapping[str, Any]
) -> list[Outcome]:
    """Runs stages one after the other; the file is complete after each of them."""
    old_facts, kept = load(options.out)
    if any(old_facts.get(key) != facts.get(key) for key in ("device", "commit")):
        kept = []  # outcomes of another GPU or commit do not belong beside these
    done: list[Outcome] = []
    for stage in stages:
        print(f"== {stage.name}: {stage.about} (at most {stage.limit:.0f} s)", flush=True)
        done.append(run_stage(stage, options))
        save(options.out, facts, merged(kept, done))
    return done


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=OUT, help="the result file; rows lie beside it")
    parser.add_argument("--arch", default="", help="compute capability to build for, like 9.0")
    options = parser.parse_args(arguments)
    if options.arch and not re.fullmatch(r"\d+\.\d+[af]?", options.arch):
        parser.error(f"--arch: expected a compute capability like 9.0, got {options.arch!r}")
    if options.out.is_dir():
        parser.error(f"--out: expected a file, {options.out} is a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU here that torch {torch.__version__} sees; nothing was checked")
        return 2
    options.arch = options.arch or "{}.{}".format(*torch.cuda.get_device_capability())
    stages = [stage for stage in STAGES if stage.name in options.stage]
    facts = header()
    done = run_stages(stages, options, facts)
    print(summary(facts, done))
    return 0 if all(outcome.status == PASSED for outcome in done) else 1


if __name__ == "__main__":
    sys.exit(main())
