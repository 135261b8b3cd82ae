"""Interleaved timing of several candidates, and what is reported about the samples."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .case import Eager

Clock = Literal["wall", "process"]
CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "process": time.process_time,  # leaves out what other programs take; sums over threads
}
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Timed:
    """A call and how one sample of it is taken: seconds per call."""

    call: Callable[[], Any]
    sample: Callable[[], float]
    method: str  # wall, process, graph or events


@dataclass
class Samples:
    """Seconds by candidate; the i-th samples of all candidates belong to one round."""

    seconds: dict[str, list[float]]
    interrupted: bool = False
    rounds: int = field(default=0)


def on_cpu(call: Callable[[], Any], clock: Clock = "wall", shortest: float = 2e-3) -> Timed:
    """Repeats short calls inside a sample, so that the clock's own cost does not count."""
    now = CLOCKS[clock]
    repeats = 0

    def sample() -> float:
        nonlocal repeats
        if not repeats:
            start = now()
            call()
            repeats = max(1, round(shortest / max(now() - start, 1e-7)))
        start = now()
        for _ in range(repeats):
            result = call()
        seconds = now() - start
        del result  # freeing belongs to nobody's time
        return seconds / repeats

    return Timed(call, sample, clock)


def on_cuda(call: Callable[[], Any], shortest: float = 5e-3) -> Timed:
    """Events around replays of a captured graph; around plain calls where capture is impossible."""
    # A failed capture can leave torch's allocator waiting for its end: known ones are not tried.
    replayed = None if isinstance(call, Eager) else _captured(call)
    run = replayed or call
    repeats = 0

    def timed(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device sleeps while the host queues work: without it, events around short kernels
        # measure how fast the host launches.
        torch.cuda._sleep(2_000_000)
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def sample() -> float:
        nonlocal repeats
        if not repeats:
            timed(1)
            repeats = max(1, round(shortest / max(timed(1), 1e-7)))
        return timed(repeats) / repeats

    return Timed(run, sample, "graph" if replayed else "events")


def _captured(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """A replay that returns the graph's output; None when the call cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def measure(
    candidates: Mapping[str, Timed],
    rounds: int,
    budget: float = float("inf"),
    progress: Callable[[int, int], None] = lambda done, total: None,
    before: Callable[[str], None] = lambda name: None,
) -> Samples:
    """One sample of every candidate per round, until `rounds` or `budget` seconds are over.

    The first place rotates and the direction alternates, so nobody always runs behind the same
    neighbour (and finds, or loses, what that one left in the caches). `before` is not timed.
    Ctrl-C ends the measurement and keeps the whole rounds that were measured.
    """
    names = list(candidates)
    samples = Samples({name: [] for name in names})
    deadline = time.monotonic() + budget
    try:
        for done in range(rounds):
            if done >= FEWEST_ROUNDS and time.monotonic() > deadline:
                break
            taken = {}
            for name in order(names, done):
                before(name)
                taken[name] = candidates[name].sample()
            for name in names:
                samples.seconds[name].append(taken[name])
            samples.rounds = done + 1
            progress(done + 1, rounds)
    except KeyboardInterrupt:
        samples.interrupted = True
    return samples


def order(names: Sequence[str], done: int) -> list[str]:
    """Every candidate comes first once per len(names) rounds; odd rounds run backwards."""
    shift = done // 2 % len(names) if names else 0
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if done % 2 else rotated


@dataclass(frozen=True)
class Summary:
    median: float
    p20: float
    p80: float


def summary(seconds: Sequence[float]) -> Summary:
    p20, _, _, p80 = (
        statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
    )
    return Summary(statistics.median(seconds), p20, p80)


def ratio_by_round(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median of the rounds' ratios: noise that lasts longer than a round cancels in it."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def show_progress(label: str) -> Callable[[int, int], None]:
    """A line on the terminal that counts rounds; elsewhere one line when they are over."""

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{label}: round {done}/{total} ", end="", file=sys.stderr, flush=True)
        if done == total:
            print("" if sys.stderr.isatty() else f"{label}: {total} rounds", file=sys.stderr)

    return progress
