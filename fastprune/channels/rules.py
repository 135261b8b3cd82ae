"""What each operation does to the channels: where they go, and what a constant one becomes.

A rule takes the trace and a node and returns the flow of its result, or raises `Opaque`.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node

from .flow import EVALUATION, TRAINING, Flow, Layer, Sink, Slot, varying

if TYPE_CHECKING:
    from .trace import Trace

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
ELEMENTWISE = (
    "relu relu6 hardtanh clamp clamp_min leaky_relu elu selu celu gelu silu mish sigmoid tanh "
    "hardsigmoid hardswish softplus abs neg exp square sqrt pow"
)
VIEWS = "dropout feature_dropout alpha_dropout contiguous clone detach alias to _to_copy"
POOLS = "max_pool adaptive_max_pool adaptive_avg_pool"
RESIZES = "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d"


class Opaque(Exception):
    """Why channels cannot be followed through an operation."""


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument by the name it has in the operation's schema."""
    if isinstance(node.target, OpOverload):
        for position, each in enumerate(node.target._schema.arguments):
            if each.name == name:
                given = node.args[position : position + 1] or [node.kwargs.get(name)]
                return each.default_value if given[0] is None else given[0]
    return default


def operation(node: Node) -> str:
    """The operation's name without its overload: conv2d, relu_."""
    if isinstance(node.target, OpOverload):
        return str(node.target.name()).split("::")[1].split(".")[0]
    return str(getattr(node.target, "__name__", node.target))


def shape(node: Any) -> list[int]:
    return list(node.meta["val"].shape)


def source(trace: "Trace", node: Node) -> Flow:
    flow = trace.flow(node.args[0])
    if flow is None:
        raise Opaque(f"it is combined with other tensors by {node.name}")
    return flow


# ---------------------------------------------------------------- layers


def convolution(trace: "Trace", node: Node) -> Flow:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    weight_name = own_weight(trace, weight, bias)
    name, module = weight_name.rpartition(".")[0], trace.module(weight_name)
    flow, groups = trace.flow(x), argument(node, "groups", 1)
    transposed = isinstance(module, TRANSPOSED)
    values = trace.tensor(weight_name)
    at = len(shape(x)) - 1 if isinstance(module, nn.Linear) else 1
    if flow is not None and (flow.dim != at or (at == 1 and len(shape(x)) != values.dim())):
        raise Opaque(f"{name} mixes another dimension than that of the channels")
    border = border_effect(name, node, values.shape, transposed)
    taps = by_group(values, groups, transposed)
    inputs = flow.emits if flow is not None else varying(taps.shape[0] * taps.shape[2])
    emits = with_bias(trace, node, mixed(taps, inputs, bool(border)))
    if groups > 1 and taps.shape[2] == 1:
        return depthwise(trace, node, weight_name, flow, emits)
    labels = trace.channels.fresh(emits.shape[1])
    row_dim, column_dim = (1, 0) if transposed else (0, 1)
    row_groups, column_groups = (groups, 1) if transposed else (1, groups)
    add_layer(trace, node, Slot(weight_name, row_dim, tuple(labels), row_groups), emits)
    if groups > 1:
        trace.channels.balanced.append(in_groups(labels, groups))
        if flow is not None:
            trace.channels.balanced.append(in_groups(flow.labels, groups))
    if flow is not None:
        columns = Slot(weight_name, column_dim, tuple(flow.labels), column_groups)
        trace.channels.slots.append(columns)
        mean = running_mean(trace, node) if bias is None else None
        trace.channels.sinks.append(Sink(name, columns, flow.emits, border, mean))
    return Flow(at, labels, emits)


def own_weight(trace: "Trace", weight: Any, bias: Any) -> str:
    """The name of the weight of a layer whose size can be changed."""
    name = trace.name(weight)
    if name is None or (bias is not None and trace.name(bias) is None):
        raise Opaque("it meets a weight that is computed")
    if not isinstance(trace.module(name), LAYERS) or name.rpartition(".")[2] != "weight":
        raise Opaque(f"{name} belongs to a {type(trace.module(name)).__name__}")
    trace.check_own(weight, bias)
    return name


def border_effect(name: str, node: Node, weight: torch.Size, transposed: bool) -> str:
    if transposed:
        return f"they emit a constant, and the outputs of {name} see different numbers of its taps"
    padding = argument(node, "padding", 0)
    if isinstance(padding, str):
        padded = padding == "same" and prod(weight[2:]) > 1
    else:
        padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    return f"they emit a constant, cut off by the zero padding of {name}" if padded else ""


def by_group(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """A weight as (groups, outputs, inputs, taps)."""
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2) if transposed else split


def mixed(taps: Tensor, inputs: Tensor, only_zero: bool) -> Tensor:
    """What the outputs of a layer emit, without bias: known where all that a row reads is."""
    inputs = inputs.to(taps.device).reshape(2, taps.shape[0], taps.shape[2])
    known = inputs == 0 if only_zero else ~inputs.isnan()
    read = (taps != 0).any(3)
    emits = torch.zeros(2, *taps.shape[:2], dtype=torch.float64, device=taps.device)
    if (known & (inputs != 0)).any():
        sums = taps.sum(3, dtype=torch.float64)
        emits = torch.einsum("goi,kgi->kgo", sums, inputs.where(known, 0.0))
    for mode in (EVALUATION, TRAINING):
        emits[mode][(read & ~known[mode].unsqueeze(1)).any(2)] = torch.nan
    return emits.reshape(2, -1).cpu()


def with_bias(trace: "Trace", node: Node, emits: Tensor) -> Tensor:
    name = trace.name(argument(node, "bias"))
    return emits if name is None else emits + trace.tensor(name).double().cpu()


def depthwise(trace: "Trace", node: Node, name: str, flow: Flow | None, emits: Tensor) -> Flow:
    if flow is None:
        raise Opaque(f"{name} is depthwise on a tensor whose channels are not known")
    multiplier = emits.shape[1] // len(flow.labels)
    labels = [label for label in flow.labels for _ in range(multiplier)]
    rows = flow.labels if isinstance(trace.module(name), TRANSPOSED) else labels
    add_layer(trace, node, Slot(name, 0, tuple(rows)), emits, tuple(labels))
    return Flow(1, labels, emits)


def add_layer(
    trace: "Trace",
    node: Node,
    weight: Slot,
    emits: Tensor,
    passed_on: tuple[int, ...] | None = None,
) -> None:
    rows = [weight]
    if (bias := trace.name(argument(node, "bias"))) is not None:
        rows.append(Slot(bias, 0, passed_on or weight.labels))
    trace.channels.slots += rows
    name = weight.name.rpartition(".")[0]
    labels = passed_on or weight.labels
    trace.channels.layers[name] = Layer(name, labels, tuple(rows), emits, passed_on is not None)


def in_groups(labels: list[int], groups: int) -> list[list[int]]:
    size = len(labels) // groups
    return [labels[i * size : (i + 1) * size] for i in range(groups)]


def running_mean(trace: "Trace", node: Node) -> str | None:
    users = list(node.users)
    if len(users) != 1 or operation(users[0]) != "batch_norm":
        return None
    mean = argument(users[0], "running_mean")
    return trace.name(mean) if mean is not None and len(mean.users) == 1 else None


def pinned_layer(trace: "Trace", node: Node, reason: str) -> Flow | None:
    """The channels of a layer that must stay as it is: named, so that a report can say why."""
    name = trace.name(argument(node, "weight"))
    if name is None or not isinstance(trace.module(name), LAYERS):
        return None
    at = len(shape(node)) - 1 if isinstance(trace.module(name), nn.Linear) else 1
    labels = trace.channels.fresh(shape(node)[at])
    trace.channels.pin(labels, reason)
    groups, transposed = argument(node, "groups", 1), isinstance(trace.module(name), TRANSPOSED)
    taps = by_group(trace.tensor(name), groups, transposed)
    emits = with_bias(trace, node, mixed(taps, varying(groups * taps.shape[2]), True))
    path = name.rpartition(".")[0]
    trace.channels.layers[path] = Layer(path, tuple(labels), (), emits)
    return Flow(at, labels, emits)


# ---------------------------------------------------------------- norms


def norm(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    names = ("weight", "bias", "running_mean", "running_var")
    nodes = [argument(node, name) for name in names]
    if any(n is not None and trace.name(n) is None for n in nodes):
        raise Opaque(f"{node.name} has a computed weight")
    held = {name: trace.name(n) for name, n in zip(names, nodes, strict=True) if n is not None}
    if flow.dim != 1 or not all(isinstance(trace.module(n), NORMS) for n in held.values() if n):
        raise Opaque(f"{node.name} is not a norm of each channel")
    trace.check_own(*nodes)
    slots = {k: Slot(name, 0, tuple(flow.labels)) for k, name in held.items() if name}
    trace.channels.slots += slots.values()
    follow(trace, node, tuple(slots[k] for k in ("weight", "bias") if k in slots))
    values = {k: trace.tensor(s.name).double().cpu() for k, s in slots.items()}
    if argument(node, "training") or argument(node, "use_input_stats"):
        values.pop("running_mean", None)
    return Flow(1, flow.labels, normalized(flow.emits, values, argument(node, "eps")))


def normalized(emits: Tensor, values: dict[str, Tensor], eps: float) -> Tensor:
    """A constant becomes the bias in training; in evaluation its distance from the mean counts."""
    scale = values.get("weight", torch.ones(emits.shape[1], dtype=torch.float64))
    offset = values.get("bias", torch.zeros_like(scale))
    result = emits * 0
    if "running_mean" in values:
        distance = emits[EVALUATION] - values["running_mean"]
        result[EVALUATION] = distance * (values["running_var"] + eps).rsqrt() * scale
    else:  # rounding of another constant's mean is divided by no more than sqrt(eps)
        result[EVALUATION] = result[EVALUATION].where(emits[EVALUATION] == 0, torch.nan)
    return result.masked_fill(scale == 0, 0.0) + offset


def follow(trace: "Trace", node: Node, affine: tuple[Slot, ...]) -> None:
    """Couples the norm with the layer right before it."""
    before = node.args[0]
    name = trace.name(argument(before, "weight")) if isinstance(before, Node) else None
    layer = trace.channels.layers.get(name.rpartition(".")[0]) if name else None
    if layer is not None and isinstance(before, Node) and len(before.users) == 1:
        trace.channels.layers[layer.name] = replace(layer, norm=affine)


# ---------------------------------------------------------------- one value at a time


def elementwise(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    if len(node.all_input_nodes) > 1:
        raise Opaque(f"{node.name} combines it with another tensor")
    call: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    emits = call(flow.emits.clone(), *node.args[1:], **node.kwargs)
    return Flow(flow.dim, flow.labels, emits.masked_fill(flow.emits.isnan(), torch.nan))


def view(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    emits = flow.emits
    if not node.meta["val"].is_floating_point():
        raise Opaque(f"{node.name} rounds")
    if "dropout" in operation(node):
        random = torch.tensor([[bool(argument(node, "train"))], [True]])
        emits = emits.masked_fill(random & (emits != 0), torch.nan)
    return Flow(flow.dim, flow.labels, emits, flow.storage)


def binary(trace: "Trace", node: Node) -> Flow:
    if node.kwargs.get("rounding_mode") is not None:
        raise Opaque(f"{node.name} rounds")
    pair = node.args[:2]
    flows = [trace.flow(operand) for operand in pair]
    at = {flow.dim - len(shape(n)) for n, flow in zip(pair, flows, strict=True) if flow}
    labels = [flow.labels for flow in flows if flow]
    if len(at) != 1 or len(labels[0]) != len(labels[-1]):
        raise Opaque(f"{node.name} combines it with other channels")
    trace.channels.join(labels[0], labels[-1])
    dim = at.pop()
    values = [
        flow.emits if flow else constants(trace, node, operand, dim, labels[0])
        for operand, flow in zip(pair, flows, strict=True)
    ]
    return Flow(dim + len(shape(node)), labels[0], combined(node, *values))


def constants(trace: "Trace", node: Node, operand: Any, dim: int, labels: list[int]) -> Tensor:
    """What a number or another tensor holds for each channel; NaN where that is not one value."""
    if not isinstance(operand, Node):
        return torch.full((2, len(labels)), float(operand), dtype=torch.float64)
    sizes = shape(operand)
    if -dim > len(sizes) or sizes[dim] == 1:
        return varying(len(labels))
    name = trace.name(operand)
    if name is None or sizes[dim] != len(labels):
        raise Opaque(f"{node.name} combines it with a tensor whose channels are not known")
    trace.check_own(operand)
    trace.channels.slots.append(Slot(name, len(sizes) + dim, tuple(labels)))
    if prod(sizes) != sizes[dim]:
        return varying(len(labels))
    return trace.tensor(name).double().cpu().reshape(1, -1).expand(2, -1)


def combined(node: Node, first: Tensor, second: Tensor) -> Tensor:
    name = operation(node).removesuffix("_")
    if name == "mul":
        return torch.where((first == 0) | (second == 0), 0.0, first * second)
    if name == "div":
        return first / second
    alpha = float(argument(node, "alpha") or 1)
    return first + (alpha if name == "add" else -alpha) * second


# ---------------------------------------------------------------- space


def pool(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    dimensions = int(operation(node)[-2])
    if flow.dim >= len(shape(node)) - dimensions:
        raise Opaque(f"{node.name} pools over channels")
    return Flow(flow.dim, flow.labels, flow.emits)


def average_pool(trace: "Trace", node: Node) -> Flow:
    flow = pool(trace, node)
    padding = argument(node, "padding")
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    if (padded and argument(node, "count_include_pad")) or argument(node, "divisor_override"):
        return Flow(flow.dim, flow.labels, flow.emits.where(flow.emits == 0, torch.nan))
    return flow


def mean(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    rank = len(shape(node.args[0]))
    dims = {d % rank for d in argument(node, "dim") or range(rank)}
    if flow.dim in dims:
        raise Opaque(f"{node.name} averages over channels")
    kept = argument(node, "keepdim") or False
    dim = flow.dim if kept else flow.dim - sum(d < flow.dim for d in dims)
    return Flow(dim, flow.labels, flow.emits)


def pad(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    widths = argument(node, "pad")
    if flow.dim >= len(shape(node)) - len(widths) // 2:
        raise Opaque(f"{node.name} adds channels")
    emits = flow.emits
    if (argument(node, "mode") or "constant") == "constant":
        emits = emits.where(emits == (argument(node, "value") or 0.0), torch.nan)
    return Flow(flow.dim, flow.labels, emits)


def resize(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    if flow.dim != 1:
        raise Opaque(f"{node.name} resizes channels")
    return Flow(flow.dim, flow.labels, flow.emits)


# ---------------------------------------------------------------- places


def reshape(trace: "Trace", node: Node) -> Flow:
    """The channel dimension may merge with those after it: then each channel is some columns."""
    flow = source(trace, node)
    before, after = shape(node.args[0]), shape(node)
    outer, channels = prod(before[: flow.dim]), before[flow.dim]
    for dim, size in enumerate(after):
        if prod(after[:dim]) == outer and size % channels == 0 and size >= channels:
            repeats = size // channels
            if repeats not in (prod(before[flow.dim + 1 : i]) for i in range(len(before) + 1)):
                break
            written = argument(node, "size") or argument(node, "shape")
            if written is not None and written[dim] != -1:
                raise Opaque(
                    f"{node.name} writes out the number of channels (use flatten, or -1 there)"
                )
            labels = [label for label in flow.labels for _ in range(repeats)]
            return Flow(dim, labels, flow.emits.repeat_interleave(repeats, 1), flow.storage)
    raise Opaque(f"{node.name} splits the channels")


def permute(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    rank = len(shape(node))
    if operation(node) == "permute":
        order = [d % rank for d in argument(node, "dims")]
    else:
        first, second = (argument(node, f"dim{i}") % rank for i in (0, 1))
        order = list(range(rank))
        order[first], order[second] = second, first
    return Flow(order.index(flow.dim), flow.labels, flow.emits, flow.storage)


def unsqueeze(trace: "Trace", node: Node) -> Flow:
    flow = source(trace, node)
    at = argument(node, "dim") % len(shape(node))
    return Flow(flow.dim + (at <= flow.dim), flow.labels, flow.emits, flow.storage)


def concatenate(trace: "Trace", node: Node) -> Flow:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    flows = [trace.flow(part) for part in parts]
    rank = len(shape(node))
    dim = (argument(node, "dim") or 0) % rank
    known = [flow for flow in flows if flow is not None]
    if any(flow.dim != known[0].dim for flow in known):
        raise Opaque(f"{node.name} joins channels that lie in different dimensions")
    if dim == known[0].dim:
        pieces = [
            flow if flow is not None else _untracked(trace, shape(part)[dim])
            for flow, part in zip(flows, parts, strict=True)
        ]
        labels = [label for piece in pieces for label in piece.labels]
        return Flow(dim, labels, torch.cat([piece.emits for piece in pieces], 1))
    if len(known) != len(flows):
        raise Opaque(f"{node.name} joins it with a tensor whose channels are not known")
    emits = known[0].emits
    for flow in known[1:]:
        trace.channels.join(known[0].labels, flow.labels)
        emits = emits.where(emits == flow.emits, torch.nan)
    return Flow(known[0].dim, known[0].labels, emits)


def _untracked(trace: "Trace", count: int) -> Flow:
    labels = trace.channels.fresh(count)
    trace.channels.pin(labels, "it does not come from a layer")
    return Flow(0, labels, varying(count))


Rule = Callable[["Trace", Node], Flow]
LAYER_RULES = (convolution,)
RULES: dict[str, Rule] = {
    **{f"conv{d}d": convolution for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": convolution for d in (1, 2, 3)},
    "linear": convolution,
    "batch_norm": norm,
    "instance_norm": norm,
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(VIEWS.split(), view),
    **dict.fromkeys(RESIZES.split(), resize),
    **dict.fromkeys(("add", "sub", "mul", "div"), binary),
    **{f"{kind}{d}d": pool for kind in POOLS.split() for d in (1, 2, 3)},
    **{f"avg_pool{d}d": average_pool for d in (1, 2, 3)},
    "mean": mean,
    "pad": pad,
    **dict.fromkeys(("flatten", "view", "reshape", "_unsafe_view"), reshape),
    **dict.fromkeys(("permute", "transpose"), permute),
    "unsqueeze": unsqueeze,
    "cat": concatenate,
}
