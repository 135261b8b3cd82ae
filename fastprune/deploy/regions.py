"""Cuts a captured graph into regions of steps and what PyTorch runs between them."""

import operator
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx, nn
from torch.fx import GraphModule, Node

from ..ops.reference.sparse import FLATTEN, Kind, Step
from .fold import ChannelAffine
from .sparse_modules import (
    KERNELS,
    InputShape,
    SparseConv2d,
    SparseLinear,
    SparseRegion,
)
from .steps import Found

Kernels = Mapping[str, str]  # by the name of the step; a step that is not in it stays in PyTorch


def assemble(module: GraphModule, found: Collection[Found], kernels: Kernels) -> GraphModule:
    """A module in which the steps named by `kernels` run in as few regions as possible."""
    chosen = chosen_steps(found, kernels)
    owner = {node: step for step in chosen for node in step.nodes}
    graph = fx.Graph()
    values: dict[Node, Node] = {}
    called: dict[str, Any] = {}
    for level, members in enumerate(levels(module, owner)):
        if level % 2:
            steps = [owner[node] for node in members]
            name = f"region{level // 2}"
            called[name] = build_region(steps, kernels, result := outside_reads(steps, owner))
            inputs = region_inputs(steps)
            node = graph.call_module(name, tuple(values[each] for each in inputs))
            for i, value in enumerate(result):
                values[value] = graph.call_function(operator.getitem, (node, i))
            continue
        for node in members:
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op in ("call_module", "get_attr"):
                called[str(node.target)] = attribute(module, str(node.target))
    return GraphModule(called, graph, type(module).__name__)


def chosen_steps(found: Collection[Found], kernels: Kernels) -> list[Found]:
    """Those with a kernel; what only renames a value goes where the value is."""
    inside: dict[Node, Found] = {}
    for step in found:
        if step.name in kernels if step.step else step.inputs[0] in inside:
            inside[step.value] = step
    return list(inside.values())


def levels(module: GraphModule, owner: Mapping[Node, Found]) -> list[list[Node]]:
    """Nodes in an order that changes between PyTorch (even) and regions (odd) as rarely as can be.

    A step is listed by the node of its value.
    """
    level: dict[Node, int] = {}
    result: list[list[Node]] = []
    for node in module.graph.nodes:
        step = owner.get(node)
        if step is not None and step.value is not node:
            continue
        before = step.inputs if step is not None else node.all_input_nodes
        lowest = max((level[each] for each in before), default=0)
        level[node] = lowest + (lowest % 2 != (step is not None))
        result += [[] for _ in range(level[node] + 1 - len(result))]
        result[level[node]].append(node)
    return result


def region_inputs(steps: Collection[Found]) -> list[Node]:
    made = {step.value for step in steps}
    reads = [node for step in steps for node in step.inputs if node not in made]
    return list(dict.fromkeys(reads))


def outside_reads(steps: Collection[Found], owner: Mapping[Node, Found]) -> list[Node]:
    """Values of a region that are read outside of it."""
    members = set(steps)
    return [
        step.value
        for step in steps
        if any(owner.get(user) not in members for user in step.value.users)
    ]


def attribute(module: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


# ---------------------------------------------------------------- one region


def build_region(
    steps: Collection[Found], kernels: Kernels, results: Collection[Node]
) -> SparseRegion:
    inputs = region_inputs(steps)
    builder = Builder(inputs, kernels)
    for step in steps:
        builder.add(step)
    for value in results:
        flags = FLATTEN if len(value.meta["shape"]) == 2 else 0
        builder.write("", Step(Kind.OUTPUT, first=builder.slots[value], flags=flags))
    shapes = [InputShape(len(shape), shape[1]) for shape in (node.meta["shape"] for node in inputs)]
    return SparseRegion(builder.layers, builder.program, builder.names, shapes)


class Builder:
    """Writes the program of a region."""

    def __init__(self, inputs: Collection[Node], kernels: Kernels) -> None:
        self.slots = {node: slot for slot, node in enumerate(inputs)}
        self.kernels = kernels
        self.program: list[int] = []
        self.names: list[str] = []
        self.layers: list[tuple[str, nn.Module]] = []
        self._num_slots = len(self.slots)
        self._num_weights = 0
        self._joined: dict[tuple[int, int], int] = {}

    def add(self, found: Found) -> None:
        sources = [self.slots[node] for node in found.inputs]
        if found.step is None:
            self.slots[found.value] = sources[0]
        elif found.step.kind == Kind.CONCAT:
            self.slots[found.value] = self._join(found, sources)
        else:
            kernel = int(KERNELS[self.kernels[found.name]])
            step = found.step._replace(weights=self._weights(found), kernel=kernel)
            self.slots[found.value] = self._emit(found.name, step, *sources)

    def write(self, name: str, step: Step) -> None:
        self.program += step
        self.names.append(name)

    def _emit(self, name: str, step: Step, first: int, second: int = -1) -> int:
        out = self._num_slots
        self._num_slots += 1
        self.write(name, step._replace(out=out, first=first, second=second))
        return out

    def _join(self, found: Found, sources: list[int]) -> int:
        """A chain of pairs; lists that begin alike share the beginning."""
        whole = sources[0]
        for each in sources[1:]:
            if (whole, each) not in self._joined:
                step = Step(Kind.CONCAT)
                self._joined[whole, each] = self._emit(found.name, step, whole, each)
            whole = self._joined[whole, each]
        return whole

    def _weights(self, found: Found) -> int:
        module = sparse_layer(found, self.kernels[found.name])
        if module is None:
            return -1
        first = self._num_weights
        self._num_weights += len(module._buffers)
        self.layers.append((found.name, module))
        return first


def sparse_layer(found: Found, kernel: str) -> nn.Module | None:
    """The step's weights as a module; packed once, since plans are many."""
    if isinstance(found.layer, ChannelAffine):
        return found.layer
    if found.rows is None and isinstance(found.layer, nn.Conv2d):
        found.rows = SparseConv2d.from_dense(found.layer)
    if found.rows is None and isinstance(found.layer, nn.Linear):
        found.rows = SparseLinear.from_dense(found.layer)
    return None if found.rows is None else found.rows.with_kernel(kernel)
