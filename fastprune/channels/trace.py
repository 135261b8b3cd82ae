"""Follows the channels through the graph of a model."""

import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .flow import Channels, Flow
from .rules import LAYER_RULES, RULES, Opaque, operation, pinned_layer

Value = Flow | list["Flow | None"] | None


def trace_channels(model: nn.Module, example_input: Any) -> Channels:
    """The channels of `model`, by the operations that it runs on `example_input` in evaluation.

    `example_input` is a tensor, or a tuple of the arguments of `model(...)`. The graph is that of
    `torch.export`, so that every operation between two layers is known by name and arguments; a
    channel that meets an operation without a rule is pinned. No floating-point work is done.
    """
    arguments = checked_arguments(model, example_input)
    with evaluating(model):
        try:
            program = torch.export.export(model, arguments, strict=False)
        except Exception as error:
            raise ValueError(
                f"torch.export cannot trace {type(model).__name__} with this example_input, so its "
                "channels are unknown. Check that model(example_input) runs, that the model does "
                "not branch on tensor values, and pass the bare module, without DDP or "
                f"torch.compile around it. The cause: {str(error).strip().splitlines()[:1]}"
            ) from error
    return Trace(model, program).run()


def checked_arguments(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, (Tensor, tuple)) or example_input == ():
        raise TypeError(
            "example_input must be a tensor the model takes, or a tuple of its arguments, got "
            f"{type(example_input).__name__}"
        )
    for path, module in model.named_modules():
        if is_parametrized(module):
            raise ValueError(
                f"{path or 'the model'} has a parametrization, so its weight is computed and "
                "cannot be cut; remove it by torch.nn.utils.parametrize.remove_parametrizations"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} has no shape yet; run one batch through the lazy model")
        if name.endswith("weight_orig"):
            raise ValueError(
                f"{name} belongs to torch.nn.utils.prune, which computes the weight in a hook; "
                "make the pruning permanent by prune.remove(module, 'weight')"
            )
    return example_input if isinstance(example_input, tuple) else (example_input,)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Trace:
    """One walk over the graph; the rules read it and write into `channels`."""

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.channels = Channels()
        self.flows: dict[Node, Value] = {}
        self._graph = program.graph
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        self._tensors: dict[str, Tensor] = dict(tensors)
        self._copies = Counter(id(tensor) for _, tensor in tensors)
        signature = program.graph_signature
        self._names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def run(self) -> Channels:
        inputs = [node for node in self._graph.nodes if node.op == "placeholder"]
        self.channels.unused = [name for n in inputs if not n.users and (name := self.name(n))]
        for node in self._graph.nodes:
            if node.op == "call_function":
                self.flows[node] = self._through(node)
            elif node.op == "output":
                self._pin(node, "it is the model's output")
        return self.channels

    def name(self, node: Any) -> str | None:
        """The name of a parameter or buffer of the model."""
        return self._names.get(node.name) if isinstance(node, Node) else None

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def module(self, name: str) -> nn.Module:
        """The module that owns a parameter or buffer."""
        return self._modules[name.rpartition(".")[0]]

    def check_own(self, *nodes: Any) -> None:
        """One layer's alone: a tensor in two roles cannot be cut for one of them."""
        for node in nodes:
            if (name := self.name(node)) is not None and (
                len(node.users) > 1 or self._copies[id(self._tensors[name])] > 1
            ):
                raise Opaque(f"{name} is used more than once")

    def flow(self, node: Any) -> Flow | None:
        value = self.flows.get(node) if isinstance(node, Node) else None
        return value if isinstance(value, Flow) else None

    def _through(self, node: Node) -> Value:
        if node.target is operator.getitem:
            source, index = node.args[0], node.args[1]
            value = self.flows.get(source) if isinstance(source, Node) else None
            return value[index] if isinstance(value, list) and isinstance(index, int) else None
        name = operation(node)
        rule = RULES.get(name.removesuffix("_"))
        flows = self._inputs(node)
        if rule is None or not (flows or rule in LAYER_RULES):
            self._pin(node, f"it goes through {name}, which may mix channels")
            value = None
        else:
            try:
                value = rule(self, node)
            except Opaque as opaque:
                self._pin(node, str(opaque))
                value = pinned_layer(self, node, str(opaque)) if rule in LAYER_RULES else None
        return self._overwritten(node, value) if name.endswith("_") else value

    def _overwritten(self, node: Node, value: Value) -> Value:
        target = self.flow(node.args[0])
        if target is None:
            self._pin(node, f"it is written into another tensor by {operation(node)}")
            return None
        views = [f for f in self._all() if f.storage is target.storage and f is not target]
        if isinstance(value, Flow) and not views:
            target.dim, target.labels, target.emits = value.dim, value.labels, value.emits
            return target
        for flow in (target, *views):
            flow.emits = torch.full_like(flow.emits, torch.nan)
            self.channels.pin(
                flow.labels, f"it, or a view of it, is overwritten by {operation(node)}"
            )
        return target

    def _all(self) -> Iterator[Flow]:
        for value in self.flows.values():
            yield from (f for f in (value if isinstance(value, list) else [value]) if f is not None)

    def _inputs(self, node: Node) -> list[Flow]:
        values = [self.flows.get(source) for source in node.all_input_nodes]
        lists = [value if isinstance(value, list) else [value] for value in values]
        return [flow for value in lists for flow in value if flow is not None]

    def _pin(self, node: Node, reason: str) -> None:
        for flow in self._inputs(node):
            self.channels.pin(flow.labels, reason)
