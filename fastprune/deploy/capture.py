"""A model as a graph that knows no sizes: layers, functions, and modules that are left whole."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from .in_place import out_of_place

# A module of one of these types, without hooks, is a call of the function.
FUNCTIONS: dict[type, str] = {
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.Conv2d: "conv2d",
    nn.Dropout: "identity",
    nn.Dropout2d: "identity",
    nn.Flatten: "flatten",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
    nn.Identity: "identity",
    nn.Linear: "linear",
    nn.MaxPool2d: "max_pool2d",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
}
TRAINING = {"dropout": 2, "stochastic_depth": 3}  # where functions take the mode


class Uncapturable(Exception):
    """Why a model has no graph that could be rearranged."""


class Tracer(fx.Tracer):
    """Follows the model's code; a module whose code branches on sizes or values is left whole."""

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        before, stack = set(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed([n for n in self.graph.nodes if n not in before]):
                self.graph.erase_node(node)
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class Observer(fx.Interpreter):
    """Notes the shape and type of every tensor in a run."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(result.shape), result.dtype
        return result


@torch.no_grad()
def capture(model: nn.Module, arguments: tuple[Any, ...]) -> GraphModule:
    """A copy of the model as a graph without in-place operations, the tensors' shapes noted.

    The graph comes from the model's code and not from a run, so that it runs with other sizes as
    the model does. Raises `Uncapturable`.
    """
    model = copy.deepcopy(model)
    try:
        graph = Tracer().trace(model)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Uncapturable(f"{type(model).__name__}.forward cannot be traced: {reason}") from error
    module = GraphModule(model, graph)
    drop_assertions(graph)
    for node in list(graph.nodes):
        if function_name(module, node) == "identity" or is_inactive(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    if reason := out_of_place(module):
        raise Uncapturable(reason)
    graph.eliminate_dead_code()
    module.recompile()
    Observer(module).run(*arguments)
    return module


def function_name(module: GraphModule, node: Node) -> str:
    """The function that a node calls, one name for module, function and method, or ""."""
    if not node.args:  # its tensor comes by keyword, which no rule looks for
        return ""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        hooked = called._forward_hooks or called._forward_pre_hooks
        return "" if hooked else FUNCTIONS.get(type(called), "")
    if node.op == "call_function":
        origin = getattr(node.target, "__module__", None) or ""
        from_torch = origin.startswith(("torch.", "_operator")) or origin in ("torch", "")
        return str(getattr(node.target, "__name__", "")) if from_torch else ""
    return str(node.target) if node.op == "call_method" else ""


def is_inactive(node: Node) -> bool:
    """A dropout whose call says that this is not training."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name not in TRAINING:
        return False
    given = node.kwargs.get("training", [*node.args, *[None] * 4][TRAINING[name]])
    return given is False


def drop_assertions(graph: fx.Graph) -> None:
    """Checks of sizes; each would take the tensor that it looks at out of its region."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            erase(graph, node)


def erase(graph: fx.Graph, node: Node) -> None:
    """With what was computed for this node alone."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if not source.users and source.op.startswith("call"):
            erase(graph, source)
