"""Layers of a captured graph, with the batch norms behind them folded in."""

import inspect
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .capture import function_name

Layer = nn.Conv2d | nn.Linear


EPS = 1e-12  # 1 + EPS is 1
FOLDED = "folded."  # before the paths of the new layers


class ChannelAffine(nn.Module):
    """x * scale + shift in each channel: a batch norm in evaluation."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        zero, one = torch.zeros_like(self.shift), torch.ones_like(self.scale)
        return F.batch_norm(x, zero, one, self.scale, self.shift, eps=EPS)  # in one pass


def fold(module: GraphModule) -> GraphModule:
    """Makes every convolution, linear layer and batch norm a module of its own, norms folded in.

    A call by function (`F.conv2d` with the model's own weight) becomes a module too; so does every
    call of a module that is called twice. A norm that no layer can take in stays as its affine map.
    """
    found = [(node, layer) for node in module.graph.nodes if (layer := find_layer(module, node))]
    norms = {node: norm for node in module.graph.nodes if (norm := find_norm(module, node))}
    names: set[str] = set()
    for node, layer in found:
        last = node
        users = list(node.users)
        norm = norms.get(users[0]) if len(users) == 1 else None
        if norm is not None and len(node.meta["shape"]) in (2, 4):  # of more, 1 is no channel
            last = users[0]
            multiply(layer, norms.pop(last))
        new = replace(module, free_name(node, names), layer, node, last)
        if isinstance(layer, nn.Linear) and len(new.meta["shape"]) > 2:
            in_two_dimensions(module.graph, new)
    for node, norm in norms.items():
        affine = ChannelAffine(norm.scale.float(), norm.shift.float())
        replace(module, free_name(node, names), affine, node, node)
    module.graph.eliminate_dead_code()
    return GraphModule(module, module.graph)  # with what the graph still reads, and no more


def replace(module: GraphModule, name: str, new: nn.Module, first: Node, last: Node) -> Node:
    """Puts one module where the graph has a chain of nodes.

    It has a path of its own, since something else may still read what the model has there.
    """
    module.add_submodule(FOLDED + name, new)
    with module.graph.inserting_before(first):
        node = module.graph.call_module(FOLDED + name, (first.args[0],))
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    for each in dict.fromkeys((last, first)):
        module.graph.erase_node(each)
    return node


def in_two_dimensions(graph: Graph, node: Node) -> None:
    """A linear layer reads [..., C] as [N, C], which costs nothing and is what regions know."""
    x = node.args[0]
    assert isinstance(x, Node)
    shape = node.meta["shape"]
    with graph.inserting_before(node):
        rows = graph.call_function(torch.flatten, (x, 0, -2))
    with graph.inserting_after(node):
        restored = graph.call_function(with_leading, (node, x))
    node.replace_all_uses_with(restored, lambda user: user is not restored)
    node.args = (rows,)
    restored.meta, node.meta, rows.meta = dict(node.meta), dict(node.meta), dict(node.meta)
    node.meta["shape"] = (prod(shape[:-1]), shape[-1])
    rows.meta["shape"] = (prod(shape[:-1]), x.meta["shape"][-1])


def with_leading(rows: Tensor, like: Tensor) -> Tensor:
    """[N, C] in the leading dimensions of another tensor."""
    return rows.view(*like.shape[:-1], rows.shape[-1])


def free_name(node: Node, names: set[str]) -> str:
    """The path of the layer in the model; with a number from its second call on."""
    if node.op == "call_module":
        base = str(node.target)
    else:
        tensor = next(source for source in node.all_input_nodes if source.op == "get_attr")
        base = str(tensor.target).rpartition(".")[0] or "layer"
    name, number = base, 1
    while name in names:
        number += 1
        name = f"{base}_{number}"
    names.add(name)
    return name


@torch.no_grad()
def multiply(layer: Layer, norm: "Norm") -> None:
    """Puts a norm behind the layer into the layer, in float64."""
    weight = layer.weight.double()
    bias = 0.0 if layer.bias is None else layer.bias.double()
    scaled = weight * norm.scale.view(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(scaled.to(layer.weight.dtype), False)
    layer.bias = nn.Parameter((bias * norm.scale + norm.shift).to(layer.weight.dtype), False)


# ---------------------------------------------------------------- what a node is


def find_layer(module: GraphModule, node: Node) -> Layer | None:
    """A new layer that computes what the node does, of weights that are the model's own."""
    name = function_name(module, node)
    if name not in ("conv2d", "linear") or "dtype" not in node.meta:
        return None
    if node.op == "call_module":
        given = module.get_submodule(str(node.target))
        if name == "linear":
            return linear_layer(given.weight, given.bias)  # type: ignore[arg-type]
        if given.padding_mode != "zeros":
            return None
        options = {each: getattr(given, each) for each in ("stride", "padding", "dilation")}
        return conv_layer(given.weight, given.bias, **options, groups=given.groups)  # type: ignore[arg-type]
    if node.op != "call_function":
        return None
    bound = bind(LINEAR if name == "linear" else CONV, node)
    if bound is None:
        return None
    bound.pop("input")
    tensors: Any = [tensor_of(module, bound.pop("weight")), tensor_of(module, bound["bias"])]
    if tensors[0] is None or (bound.pop("bias") is not None and tensors[1] is None):
        return None
    return linear_layer(*tensors) if name == "linear" else conv_layer(*tensors, **bound)


CONV = inspect.signature(
    lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None
)
LINEAR = inspect.signature(lambda input, weight, bias=None: None)
NORM = inspect.signature(F.batch_norm)


def bind(signature: inspect.Signature, node: Node) -> dict[str, Any] | None:
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def tensor_of(module: GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that a node reads."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    path, _, attribute = str(node.target).rpartition(".")
    value = getattr(module.get_submodule(path), attribute)
    return value if isinstance(value, Tensor) else None


def conv_layer(
    weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> nn.Conv2d | None:
    if isinstance(padding, str):
        sizes = padding_sizes(padding, weight.shape[2:], dilation)
        if sizes is None:
            return None
        padding = sizes
    outputs, inputs, *size = weight.shape
    shape: Any = (inputs * groups, outputs, tuple(size), stride, padding, dilation, groups, True)
    with torch.device("meta"):
        layer = nn.Conv2d(*shape)
    set_tensors(layer, weight, bias)
    return layer


def padding_sizes(padding: str, kernel: Any, dilation: Any) -> tuple[int, ...] | None:
    """In numbers; None for "same" with an even kernel, which pads more on one side."""
    if padding == "valid":
        return (0,) * len(kernel)
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * len(kernel)
    totals = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
    return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


def linear_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    set_tensors(layer, weight, bias)
    return layer


def set_tensors(layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    layer.weight = nn.Parameter(weight.detach().clone(), False)
    layer.bias = nn.Parameter(bias.detach().clone(), False)


class Norm(NamedTuple):
    """x * scale + shift, float64."""

    scale: Tensor
    shift: Tensor


def find_norm(module: GraphModule, node: Node) -> Norm | None:
    if function_name(module, node) != "batch_norm" or "dtype" not in node.meta:
        return None
    if node.op == "call_module":
        given: Any = module.get_submodule(str(node.target))
        parts: list[Any] = [given.running_mean, given.running_var, given.weight, given.bias]
        return norm(given.eps, *parts)
    bound = bind(NORM, node)
    if bound is None or bound["training"] is not False:
        return None
    names = ("running_mean", "running_var", "weight", "bias")
    tensors: list[Any] = [tensor_of(module, bound[name]) for name in names]
    if any(bound[n] is not None and t is None for n, t in zip(names, tensors, strict=True)):
        return None
    return norm(bound["eps"], *tensors)


def norm(
    eps: float,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Norm | None:
    """None for a norm that keeps no statistics and so depends on the batch."""
    if mean is None or variance is None:
        return None
    scale = (variance.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return Norm(scale, shift if bias is None else shift + bias.double())
