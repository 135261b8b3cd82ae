"""Plans, builds and times the sparse form of a folded graph."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .measure import CannotCompile, channels_last, compiled, measure_steps, measure_whole
from .plan import CANDIDATES, DENSE, Costs, best_kernel, cheapest, expected_costs
from .regions import assemble
from .sparse_model import COMPILED, EAGER, SPARSE, Choices, SparseModel, make_choices
from .sparse_modules import SparseRegion
from .sparse_report import LayerKernel, Sparsification
from .steps import Found, find_steps

SLOWER = 1.03  # the fastest rival is returned if the sparse model takes longer than this times it
UNSURE = 1.25  # sums of steps tell plans apart that differ by more than this
RIVALS = (EAGER, COMPILED)


def convert(
    graph: GraphModule,
    dense: nn.Module,
    arguments: tuple[Any, ...],
    measure: bool,
    choices: Choices | None = None,
    rivals: Collection[str] = RIVALS,
) -> SparseModel:
    """The best module for a folded graph; `dense` computes the same."""
    found = list(find_steps(graph).values())
    graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    measure = measure and choices is None
    costs = measure_steps(graph, found, arguments) if measure else expected_costs(found)
    kernels = cheapest(found, costs)
    if choices is not None:
        kernels = {name: choices["kernels"].get(name, kernel) for name, kernel in kernels.items()}
    race = Race(SPARSE if choices is None else choices["returned"])
    if measure:
        variants = promising([kernels, *uniform(kernels, costs)], costs)
        networks = [assemble(graph, found, sparse_only(each)) for each in variants]
        race = run_race(networks, dense, arguments, rivals)
        kernels, network = variants[race.variant], networks[race.variant]
    else:
        network = assemble(graph, found, sparse_only(kernels))
    report = Sparsification(
        layers(found, kernels, costs if measure else None),
        sum(not each.has_rows and kernels.get(each.name, DENSE) != DENSE for each in found),
        sum(isinstance(each, SparseRegion) for each in network.modules()),
        {name: 1e3 * seconds for name, seconds in race.seconds.items()},
        race.returned,
        torch.get_num_threads(),
        tuple(race.notes),
    )
    chosen = make_choices(kernels, race.returned)
    winner = network if race.returned == SPARSE else dense
    return SparseModel(winner, chosen, report, race.compiled)


def sparse_only(kernels: Mapping[str, str]) -> dict[str, str]:
    return {name: kernel for name, kernel in kernels.items() if kernel != DENSE}


def uniform(kernels: Mapping[str, str], costs: Costs) -> list[dict[str, str]]:
    """Plans without a dense step: of the best kernels, and of one kernel throughout.

    Steps are timed beside neighbours with the same kernel, so the whole has the last word.
    """
    best = {name: best_kernel(costs.sparse[name]) for name in kernels}
    return [best, *(dict.fromkeys(kernels, kernel) for kernel in CANDIDATES)]


def promising(plans: list[dict[str, str]], costs: Costs) -> list[dict[str, str]]:
    """The first plan, and those that could be as fast by the sum of their steps."""
    sums = [sum(cost(costs, *item) for item in plan.items()) for plan in plans]
    near = [p for p, seconds in zip(plans, sums, strict=True) if seconds <= UNSURE * min(sums)]
    return [plans[0], *(p for i, p in enumerate(near) if p not in (plans[0], *near[:i]))]


def cost(costs: Costs, name: str, kernel: str) -> float:
    return costs.dense[name] if kernel == DENSE else costs.sparse[name][kernel]


@dataclass
class Race:
    """What was timed, and which module is returned."""

    returned: str
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    variant: int = 0  # the fastest of the sparse ones
    compiled: Callable[..., Any] | None = None


def run_race(
    networks: Sequence[nn.Module],
    dense: nn.Module,
    arguments: tuple[Any, ...],
    rivals: Collection[str],
) -> Race:
    """Times variants of the sparse network and the dense model, all in turns."""
    race = Race(SPARSE)
    inputs = channels_last(arguments)
    candidates: dict[str, Callable[[], Any]] = {
        f"{SPARSE} {i}": partial(network, *arguments) for i, network in enumerate(networks)
    }
    if EAGER in rivals:
        candidates[EAGER] = lambda: dense(*inputs)
    if COMPILED in rivals:
        try:
            function = race.compiled = compiled(dense, inputs)
            candidates[COMPILED] = lambda: function(*inputs)
        except CannotCompile as reason:
            race.notes.append(f"not timed against torch.compile: {reason}")
    measured = measure_whole(candidates)
    ours = [measured.pop(f"{SPARSE} {i}") for i in range(len(networks))]
    race.variant = ours.index(min(ours))
    race.seconds = {SPARSE: min(ours), **measured}
    race.returned = fastest(race.seconds)
    if race.returned != COMPILED:
        race.compiled = None
    if race.returned != SPARSE:
        race.notes.append(
            f"the dense model ({race.returned}) is returned: it takes "
            f"{1e3 * race.seconds[race.returned]:.2f} ms, the sparse one "
            f"{1e3 * race.seconds[SPARSE]:.2f} ms"
        )
        warnings.warn(f"fp.sparsify: {race.notes[-1]}", stacklevel=4)
    return race


def fastest(seconds: Mapping[str, float]) -> str:
    """The sparse model unless a rival is clearly faster."""
    first = min(seconds, key=seconds.__getitem__)
    return SPARSE if seconds[SPARSE] <= SLOWER * seconds[first] else first


def layers(
    found: Collection[Found], kernels: Mapping[str, str], costs: Costs | None
) -> tuple[LayerKernel, ...]:
    rows = []
    for step in found:
        if not step.has_rows:
            continue
        weight = step.layer.weight  # type: ignore[union-attr]
        sparsity = 1 - float(weight.count_nonzero()) / max(1, weight.numel())  # type: ignore
        kernel = kernels[step.name]
        ms = dense_ms = None
        if costs is not None:
            dense_ms = 1e3 * costs.dense[step.name]
            ms = 1e3 * cost(costs, step.name, kernel)
        rows.append(LayerKernel(step.name, sparsity, kernel, ms, dense_ms))
    return tuple(rows)
