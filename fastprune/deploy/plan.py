"""Which steps run in sparse regions and which stay in PyTorch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch.fx import Node

from ..ops.reference.sparse import Kernel
from .steps import Found

DENSE = "dense"
CANDIDATES = [each.name.lower() for each in Kernel if each != Kernel.AUTOMATIC]
REGION, TORCH = "region", "torch"
AUTOMATIC = Kernel.AUTOMATIC.name.lower()

# Without measurements: multiply-adds that cost as much as one of a dense layer's, as one of a
# sparse layer's, and as carrying one number over the border of a region.
DENSE_COST, SPARSE_COST, BORDER_COST = 1.0, 3.0, 60.0


@dataclass
class Costs:
    """What each way to run a step costs, in any unit; values that cross a border by their node."""

    dense: dict[str, float] = field(default_factory=dict)
    sparse: dict[str, dict[str, float]] = field(default_factory=dict)  # by kernel
    leave: dict[Node, float] = field(default_factory=dict)
    enter: dict[Node, float] = field(default_factory=dict)


def expected_costs(found: Collection[Found]) -> Costs:
    """By counting, for a plan that measures nothing."""
    costs = Costs()
    for step in found:
        costs.dense[step.name] = costs_sparse = 0.0
        layer: Any = step.layer
        if step.has_rows:
            weight = layer.weight.detach()
            pixels = prod(step.value.meta["shape"]) / len(weight)
            costs.dense[step.name] = DENSE_COST * pixels * weight.numel()
            costs_sparse = SPARSE_COST * pixels * float(weight.count_nonzero())
        costs.sparse[step.name] = {AUTOMATIC: costs_sparse}
        for node in (step.value, *step.inputs):
            border = BORDER_COST * prod(node.meta["shape"])
            costs.leave[node] = costs.enter[node] = border
    return costs


def cheapest(found: Collection[Found], costs: Costs) -> dict[str, str]:
    """The kernel of every step, or `DENSE`, such that steps and borders cost least together.

    A minimum cut: steps on the source's side run in regions, the others in PyTorch. A value that
    crosses the border is paid once, however many read it.
    """
    import networkx  # torch brings it; slow to import

    graph = networkx.DiGraph()
    graph.add_nodes_from((REGION, TORCH))
    makers = {step.value: step for step in found}
    owners = {node: step.value for step in found for node in step.nodes}
    units = unit(costs)
    for step in found:
        if step.step is None:  # it goes where its input goes
            source = step.inputs[0] if step.inputs[0] in makers else TORCH
            graph.add_edges_from([(step.value, source), (source, step.value)])
            continue
        sparse = min(costs.sparse[step.name].values())
        graph.add_edge(REGION, step.value, capacity=round(costs.dense[step.name] / units))
        graph.add_edge(step.value, TORCH, capacity=round(sparse / units))
    for value in dict.fromkeys(node for step in found for node in (*step.inputs, step.value)):
        maker = value if value in makers else TORCH
        leave, enter = ("leave", value), ("enter", value)
        graph.add_edge(maker, leave, capacity=round(costs.leave.get(value, 0.0) / units))
        graph.add_edge(enter, maker, capacity=round(costs.enter.get(value, 0.0) / units))
        for reader in {owners.get(user, TORCH) for user in value.users}:
            graph.add_edge(leave, reader)  # without a capacity: never cut
            graph.add_edge(reader, enter)
    _, (inside, _) = networkx.minimum_cut(graph, REGION, TORCH)
    return {
        step.name: best_kernel(costs.sparse[step.name]) if step.value in inside else DENSE
        for step in found
        if step.step is not None
    }


def unit(costs: Costs) -> float:
    """Whole numbers make the cut exact."""
    return max(max(costs.dense.values(), default=0.0), *costs.leave.values(), 1e-9) / 1e9


def best_kernel(costs: Mapping[str, float]) -> str:
    return min(costs, key=costs.__getitem__)
