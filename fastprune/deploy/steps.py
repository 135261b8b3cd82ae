"""What of a captured graph the operator `sparse_network` understands, fused into its steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..ops.reference.sparse import CEIL_MODE, COUNT_INCLUDE_PAD, Activation, Kind, Step
from .capture import function_name
from .fold import FOLDED, ChannelAffine
from .sparse_modules import SparseRows


@dataclass(eq=False)
class Found:
    """A step that stands for some nodes of the graph; the last of them has its value.

    Without a `step` the value is its input, perhaps in another shape: [N, C, 1, 1] as [N, C].
    """

    name: str
    step: Step | None
    nodes: list[Node]
    inputs: list[Node]
    layer: nn.Conv2d | nn.Linear | ChannelAffine | None = None
    one_pixel: bool = False  # for every input of the model
    rows: SparseRows | None = None  # of the layer, once they were needed

    @property
    def value(self) -> Node:
        return self.nodes[-1]

    @property
    def has_rows(self) -> bool:
        return isinstance(self.layer, (nn.Conv2d, nn.Linear))


ACTIVATIONS = {each.name.lower(): each for each in Activation if each != Activation.NONE}
FUSES_ACTIVATION = (Kind.CONV, Kind.LINEAR, Kind.ADD, Kind.AFFINE, Kind.SCALE)
Rule = Callable[..., Found | None]
RULES: dict[str, Rule] = {}


def find_steps(module: GraphModule) -> dict[Node, Found]:
    """The steps in the order of the graph, under the node of their value."""
    finder = Finder(module)
    for node in module.graph.nodes:
        finder.visit(node)
    return finder.found


@dataclass
class Finder:
    """Goes through the graph; a later node may join the step of an earlier one."""

    module: GraphModule
    found: dict[Node, Found] = field(default_factory=dict)
    varying: set[Node] = field(default_factory=set)  # with the input; the rest has no batch

    def visit(self, node: Node) -> None:
        if node.op == "placeholder" or not self.varying.isdisjoint(node.all_input_nodes):
            self.varying.add(node)
        if not is_image(node):
            return
        name = function_name(self.module, node)
        if node.op == "call_module":
            called = self.module.get_submodule(str(node.target))
            name = "affine" if isinstance(called, ChannelAffine) else name
        if name in ACTIVATIONS:
            result = self.activation(node, ACTIVATIONS[name])
        elif (rule := RULES.get(name)) is not None:
            arguments = self.arguments(node, name)
            try:
                result = rule(self, node, *arguments[0], **arguments[1])
            except TypeError:  # called in a way that the rule does not know
                result = None
        else:
            result = None
        if result is not None:
            self.found[result.value] = result

    def arguments(self, node: Node, name: str) -> tuple[Sequence[Any], dict[str, Any]]:
        if node.op != "call_module":
            return node.args, node.kwargs
        called = self.module.get_submodule(str(node.target))
        options = {each: getattr(called, each) for each in OPTIONS.get(name, ())}
        return node.args, options

    def make(self, node: Node, step: Step | None, *sources: Any, **more: Any) -> Found | None:
        if not all(is_image(source) and source in self.varying for source in sources):
            return None
        name = str(node.target).removeprefix(FOLDED) if "layer" in more else node.name
        return Found(name, step, [node], list(sources), **more)

    def one_pixel(self, node: Any) -> bool:
        return rank(node) == 2 or (node in self.found and self.found[node].one_pixel)

    def extendable(self, node: Any, kinds: tuple[Kind, ...]) -> Found | None:
        """The step with this value if nothing else reads it and no activation is in it."""
        found = self.found.get(node)
        if found is None or found.step is None or len(node.users) != 1:
            return None
        plain = found.step.kind in kinds and found.step.activation == Activation.NONE
        return found if plain else None

    def activation(self, node: Node, function: Activation) -> Found | None:
        x = node.args[0]
        before = self.extendable(x, FUSES_ACTIVATION)
        if before is not None and before.step is not None:
            del self.found[before.value]
            before.step = before.step._replace(activation=int(function))
            before.nodes.append(node)
            return before
        step = Step(Kind.AFFINE, activation=int(function))
        return self.make(node, step, x, one_pixel=self.one_pixel(x))


def rank(node: Any) -> int:
    return len(node.meta.get("shape", ())) if isinstance(node, Node) else 0


def is_image(node: Any) -> bool:
    """A float32 tensor [N, C, H, W] or [N, C]."""
    return rank(node) in (2, 4) and node.meta["dtype"] == torch.float32


def same_shape(first: Any, second: Any) -> bool:
    return bool(first.meta["shape"] == second.meta["shape"])


def pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    if type(first) is not int or type(second) is not int:
        raise TypeError("a size that is computed")
    return first, second


# ---------------------------------------------------------------- rules
# A rule has the arguments of its function, tensors as nodes. None: not understood.

OPTIONS = {
    "max_pool2d": ["kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"],
    "avg_pool2d": [
        *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        "divisor_override",
    ],
    "adaptive_avg_pool2d": ["output_size"],
    "flatten": ["start_dim", "end_dim"],
}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add_rule(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add_rule


@rule("conv2d")
def convolution(finder: Finder, node: Node, x: Any) -> Found | None:
    layer = finder.module.get_submodule(str(node.target))
    if not isinstance(layer, nn.Conv2d) or rank(x) != 4 or isinstance(layer.padding, str):
        return None
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    numbers = [number for size in sizes for number in size]
    step = Step(*(Kind.CONV, -1, -1, -1, -1, *numbers, layer.groups))
    stays = layer.kernel_size == (1, 1) and layer.padding == (0, 0) and finder.one_pixel(x)
    return finder.make(node, step, x, layer=layer, one_pixel=stays)


@rule("affine")
def affine(finder: Finder, node: Node, x: Any) -> Found | None:
    layer: Any = finder.module.get_submodule(str(node.target))
    one_pixel = finder.one_pixel(x)
    return finder.make(node, Step(Kind.AFFINE), x, layer=layer, one_pixel=one_pixel)


@rule("linear")
def linear(finder: Finder, node: Node, x: Any) -> Found | None:
    layer = finder.module.get_submodule(str(node.target))
    if not isinstance(layer, nn.Linear) or rank(x) != 2:
        return None
    return finder.make(node, Step(Kind.LINEAR), x, layer=layer, one_pixel=True)


@rule("max_pool2d")
def max_pool(
    finder: Finder,
    node: Node,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Found | None:
    if rank(x) != 4 or return_indices:
        return None
    sizes = (*pair(kernel_size), *pair(stride or kernel_size), *pair(padding), *pair(dilation))
    step = Step(Kind.MAX_POOL, -1, -1, -1, -1, *sizes, flags=CEIL_MODE * bool(ceil_mode))
    return finder.make(node, step, x)


@rule("avg_pool2d")
def average_pool(
    finder: Finder,
    node: Node,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Found | None:
    if rank(x) != 4 or divisor_override is not None:
        return None
    sizes = (*pair(kernel_size), *pair(stride or kernel_size), *pair(padding))
    flags = CEIL_MODE * bool(ceil_mode) + COUNT_INCLUDE_PAD * bool(count_include_pad)
    return finder.make(node, Step(Kind.AVERAGE_POOL, -1, -1, -1, -1, *sizes, flags=flags), x)


@rule("adaptive_avg_pool2d")
def adaptive_average_pool(finder: Finder, node: Node, x: Any, output_size: Any) -> Found | None:
    if rank(x) != 4 or pair(output_size) != (1, 1):
        return None
    return finder.make(node, Step(Kind.GLOBAL_AVERAGE_POOL), x, one_pixel=True)


@rule("mean")
def mean(finder: Finder, node: Node, x: Any, dim: Any, keepdim: bool = False) -> Found | None:
    if rank(x) != 4 or sorted(d % 4 for d in dim) != [2, 3]:
        return None
    return finder.make(node, Step(Kind.GLOBAL_AVERAGE_POOL), x, one_pixel=True)


@rule("flatten")
def flatten(
    finder: Finder, node: Node, x: Any, start_dim: int = 0, end_dim: int = -1
) -> Found | None:
    if rank(x) != 4 or start_dim != 1 or end_dim not in (-1, 3) or not finder.one_pixel(x):
        return None
    return finder.make(node, None, x, one_pixel=True) if x in finder.found else None


@rule("add")
def add(finder: Finder, node: Node, a: Any, b: Any) -> Found | None:
    if not (is_image(a) and is_image(b) and same_shape(a, b)):
        return None
    if finder.one_pixel(a) != finder.one_pixel(b) or not finder.varying.issuperset((a, b)):
        return None
    order = {each: i for i, each in enumerate(finder.found)}
    for x, other in sorted([(a, b), (b, a)], key=lambda pair: -order.get(pair[0], -1)):
        before = finder.extendable(x, (Kind.CONV, Kind.LINEAR))
        if before is not None and len(before.inputs) == 1 and x is not other:
            del finder.found[before.value]
            before.inputs.append(other)
            before.nodes.append(node)
            return before
    return finder.make(node, Step(Kind.ADD), a, b, one_pixel=finder.one_pixel(a))


@rule("mul")
def scale(finder: Finder, node: Node, a: Any, b: Any) -> Found | None:
    """A gate of one pixel for each channel."""
    if rank(a) != 4 or rank(b) != 4 or finder.one_pixel(a) == finder.one_pixel(b):
        return None
    x, gate = (b, a) if finder.one_pixel(a) else (a, b)
    if x.meta["shape"][:2] != gate.meta["shape"][:2]:
        return None
    return finder.make(node, Step(Kind.SCALE), x, gate)


@rule("cat", "concat")
def concat(finder: Finder, node: Node, tensors: Any, dim: int = 0) -> Found | None:
    if dim not in (1, -3) or any(rank(each) != 4 for each in tensors):
        return None
    pixels = {finder.one_pixel(each) for each in tensors}
    if len(pixels) > 1:
        return None
    step = Step(Kind.CONCAT) if len(tensors) > 1 else None
    return finder.make(node, step, *tensors, one_pixel=pixels.pop())
