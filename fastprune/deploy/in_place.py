"""Takes operations that overwrite their input out of a graph, so that its parts can be moved."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
LAYERS = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.MaxPool2d, nn.AvgPool2d)
FRESH = (
    *("add", "sub", "mul", "truediv", "div", "cat", "mean", "conv2d", "linear", "batch_norm"),
    *("layer_norm", "max_pool2d", "avg_pool2d", "relu", "relu6", "silu", "hardswish"),
    *("hardsigmoid", "sigmoid", "gelu", "softmax"),
)


def out_of_place(module: GraphModule) -> str:
    """Replaces what overwrites by what returns: later readers of the input read the result.

    Returns why that is not possible, or "".
    """
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    memory: dict[Node, object] = {}  # equal for nodes that may share memory
    writers = {node for node in position if overwrites(module, node)}  # calls may share a module
    for node in position:
        if node not in writers:
            if inner_writers(module, node):
                for other in memory:
                    shares = any(memory[other] is memory[x] for x in node.all_input_nodes)
                    if shares and any(position[user] > position[node] for user in other.users):
                        return f"{node.target} may write into {other}, which is read later"
            sources = [] if is_fresh(module, node) else node.all_input_nodes
            mine = memory[node] = object()
            shared = {memory[source] for source in sources}
            memory.update({other: mine for other, old in memory.items() if old in shared})
            continue
        target = node.args[0] if node.args else None
        if not isinstance(target, Node) or target.op == "get_attr":
            return f"{node.target} writes into a tensor of the model"
        views = [n for n in memory if n is not target and memory[n] is memory[target]]
        for view in views:
            if any(position[user] > position[node] for user in view.users):
                return f"{node.target} writes into {target}, of which {view} may be a view"
        if not rewrite(module, node):
            return f"{node.target} writes into a tensor"
        late = {user for user in target.users if position[user] > position[node]}
        target.replace_all_uses_with(node, late.__contains__)
        memory[node] = object()
    return ""


def inner_writers(module: GraphModule, node: Node) -> bool:
    """A module that is left whole, with parts that overwrite their input."""
    if node.op != "call_module":
        return False
    inner = list(module.get_submodule(str(node.target)).modules())[1:]
    return any(getattr(each, "inplace", None) is True for each in inner)


def is_fresh(module: GraphModule, node: Node) -> bool:
    """Its result shares no memory with its inputs."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return isinstance(called, LAYERS) or hasattr(called, "inplace")
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op.startswith("call") and name in FRESH


def overwrites(module: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", None) is True
    if node.op == "call_method":
        return ends_in_place(str(node.target))
    if node.op != "call_function":
        return False
    position = inplace_position(node)
    flagged = node.kwargs.get("inplace") is True or True in node.args[position : position + 1]
    written = node.target in OPERATORS or node.target is operator.setitem or "out" in node.kwargs
    return written or flagged or ends_in_place(getattr(node.target, "__name__", ""))


def inplace_position(node: Node) -> int:
    """Where a function takes the argument `inplace`; behind the last if it has none."""
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # of C
        return len(node.args)
    return names.index("inplace") if "inplace" in names else len(node.args)


def ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def rewrite(module: GraphModule, node: Node) -> bool:
    """The same operation, returning its result; False if there is none."""
    if node.op == "call_module":
        module.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]
        return True
    if node.op == "call_method":
        node.target = str(node.target).removesuffix("_")
        return callable(getattr(Tensor, node.target, None))
    if node.target is operator.setitem or "out" in node.kwargs:
        return False
    if node.target in OPERATORS:
        node.target = OPERATORS[node.target]
        return True
    name = getattr(node.target, "__name__", "")
    if ends_in_place(name):
        node.target = getattr(torch, name.removesuffix("_"), None) or ""
    else:
        node.args = node.args[: inplace_position(node)]
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    return node.target != ""
