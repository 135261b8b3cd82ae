"""Times the ways to run a step, and whole modules against each other, on this machine."""

import os
import shutil
import signal
import statistics
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from ..ops.reference.sparse import Kind, Step
from ..progress import Progress
from .plan import CANDIDATES, Costs
from .regions import assemble
from .sparse_modules import InputShape, SparseRegion
from .steps import Found

ROUNDS, FEWEST_ROUNDS = 9, 3
STEP_SECONDS, WHOLE_SECONDS, COMPILE_SECONDS = 60.0, 30.0, 180.0  # budgets
Arguments = tuple[Any, ...]


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- steps


class NodeTimes(fx.Interpreter):
    """Runs a graph and notes the seconds of every node."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[Node, float] = {}

    def run_node(self, n: Node) -> Any:
        start = perf_counter()
        result = super().run_node(n)
        self.seconds[n] = perf_counter() - start
        return result


class StepTimes(fx.Interpreter):
    """Runs a module of regions and notes the seconds of every step, by its name."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        region = self.fetch_attr(str(target))
        if isinstance(region, SparseRegion):
            for name, seconds in zip(region.names, region.profile(*args), strict=True):
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def measure_steps(module: GraphModule, found: Collection[Found], arguments: Arguments) -> Costs:
    """The seconds of every step in PyTorch and with every kernel, each in its place in the model.

    All steps run with one kernel, then with the next, round by round.
    """
    names = [step.name for step in found if step.step is not None]
    whole = {k: assemble(module, found, dict.fromkeys(names, k)) for k in CANDIDATES}
    dense: list[dict[Node, float]] = []
    sparse: dict[str, list[dict[str, float]]] = {kernel: [] for kernel in CANDIDATES}
    inputs = channels_last(arguments)
    stop = perf_counter() + STEP_SECONDS
    with Progress("measuring kernels", ROUNDS) as progress:
        for done in range(ROUNDS + 1):  # the first prepares
            if done > FEWEST_ROUNDS and perf_counter() > stop:
                break
            (run := NodeTimes(module)).run(*inputs)
            dense.append(run.seconds)
            for kernel, each in whole.items():
                (profile := StepTimes(each)).run(*arguments)
                sparse[kernel].append(profile.seconds)
            progress.advance()
    costs = measure_borders(found)
    for step in found:
        times = [sum(seconds[node] for node in step.nodes) for seconds in dense[1:]]
        costs.dense[step.name] = statistics.median(times)
        costs.sparse[step.name] = {
            kernel: statistics.median(seconds.get(step.name, 0.0) for seconds in runs[1:])
            for kernel, runs in sparse.items()
        }
    return costs


def measure_borders(found: Collection[Found]) -> Costs:
    """What it takes to bring each value out of a region, and into one."""
    costs = Costs()
    shapes: dict[tuple[int, ...], tuple[float, float]] = {}
    for node in dict.fromkeys(node for step in found for node in (*step.inputs, step.value)):
        shape = node.meta["shape"]
        if shape not in shapes:
            shapes[shape] = border_seconds(shape)
        costs.leave[node], costs.enter[node] = shapes[shape]
    return costs


def border_seconds(shape: tuple[int, ...]) -> tuple[float, float]:
    """Out of a region and into the layout that PyTorch's convolutions like; and in."""
    x = torch.randn(shape)
    rows = [*Step(Kind.AFFINE, 1, 0), *Step(Kind.OUTPUT, first=1)]
    region = SparseRegion([], rows, ["", ""], [InputShape(len(shape), shape[1])])
    samples = []
    for _ in range(FEWEST_ROUNDS + 1):
        enter, leave = region.profile(x)
        start = perf_counter()
        channels_last((x,))
        samples.append((leave + perf_counter() - start, enter))
    leaves, enters = zip(*samples[1:], strict=True)
    return statistics.median(leaves), statistics.median(enters)


def channels_last(arguments: Arguments) -> Arguments:
    return tuple(
        x.contiguous(memory_format=torch.channels_last)
        if isinstance(x, Tensor) and x.dim() == 4
        else x
        for x in arguments
    )


# ---------------------------------------------------------------- whole modules


@torch.no_grad()
def measure_whole(candidates: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The median seconds of each call, taken in turns."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    stop = perf_counter() + WHOLE_SECONDS
    with Progress("timing the whole model", ROUNDS) as progress:
        for done in range(ROUNDS):
            if done >= FEWEST_ROUNDS and perf_counter() > stop:
                break
            for name in list(candidates)[:: -1 if done % 2 else 1]:
                start = perf_counter()
                candidates[name]()
                samples[name].append(perf_counter() - start)
            progress.advance()
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


class CannotCompile(Exception):
    """Why torch.compile is not among the rivals."""


def compiled(model: nn.Module, arguments: Arguments) -> Callable[..., Any]:
    """`torch.compile(model.forward)`, compiled, within a bound of time."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise CannotCompile("there is no C++ compiler")
    if threading.current_thread() is not threading.main_thread():
        raise CannotCompile("its time can only be bounded in the main thread")
    function: Callable[..., Any] = torch.compile(model.forward)
    try:
        with deadline(COMPILE_SECONDS), torch.no_grad():
            function(*arguments)
    except CannotCompile:
        raise
    except Exception as error:
        raise CannotCompile((str(error).strip().splitlines() or ["it failed"])[0]) from error
    return function


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    def over(number: int, frame: Any) -> None:
        raise CannotCompile(f"it took more than {seconds:.0f} s to compile")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
