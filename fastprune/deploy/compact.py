"""Takes channels of zeros out of a model."""

import copy
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from ..channels import Channels, trace_channels
from ..channels.trace import checked_arguments, evaluating
from .choice import Choice, choose, why_stayed
from .report import Compaction, LayerChange
from .surgery import (
    absorb,
    check_cuts,
    check_optimizer,
    cut_in_place,
    cut_tensors,
    plan_cuts,
    replace_tensors,
)

# Of the largest output. A GPU may multiply in TF32, whose mantissa is 10 bits long.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TOLERANCE_CUDA = {torch.float64: 1e-9, torch.float32: 1e-2}
TOLERANCE_16_BIT = 5e-2


@overload
def compact(
    model: nn.Module,
    example_input: Any,
    optimizer: Optimizer | None = None,
    *,
    multiple_of: int = 1,
    return_report: Literal[False] = False,
) -> nn.Module: ...


@overload
def compact(
    model: nn.Module,
    example_input: Any,
    optimizer: Optimizer | None = None,
    *,
    multiple_of: int = 1,
    return_report: Literal[True],
) -> tuple[nn.Module, Compaction]: ...


def compact(
    model: nn.Module,
    example_input: Any,
    optimizer: Optimizer | None = None,
    *,
    multiple_of: int = 1,
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, Compaction]:
    """The model without its zero channels: an ordinary, smaller module with the same outputs.

    A channel goes when each layer that reads it gets zeros from it, or a constant that its bias
    can take over exactly, or ignores it. Others stay, and the report says why. The model is a copy
    and the outputs are those of evaluation.

    With an optimizer both are changed in place, because it refers to the parameters: gradients and
    state are cut alike, learning rates, counters and schedulers go on. Then only channels go that
    emit 0 in training too, so that the next steps are those of the large model under masks.

    Before anything is returned or changed, the outputs of the small model are compared with those
    of the large one on random inputs.

    Args:
        example_input: a tensor that the model takes, or a tuple of its arguments.
        multiple_of: round the kept channels of each layer up to a multiple, as hardware likes it.
        return_report: also return a `Compaction`, which prints as a table.
    """
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of must be a positive integer, got {multiple_of!r}")
    if optimizer is not None:
        check_optimizer(optimizer, model)
    arguments = checked_arguments(model, example_input)
    channels = trace_channels(model, arguments)
    choice = choose(channels, model, optimizer is not None, multiple_of)
    report = make_report(model, channels, choice)
    if optimizer is not None:
        check_cuts(model, channels, plan_cuts(channels, choice.gone), optimizer)

    small = copy.deepcopy(model)
    for sink in channels.sinks:
        absorb(small, channels, sink, choice.gone)
    cuts = plan_cuts(channels, choice.gone)
    replace_tensors(small, cut_tensors(small, cuts))
    check_outputs(model, small, arguments)
    if optimizer is not None:
        cut_in_place(model, cuts, optimizer)
        small = model
    report = report._replace(parameters_after=num_parameters(small))
    return (small, report) if return_report else small


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_report(model: nn.Module, channels: Channels, choice: Choice) -> Compaction:
    layers = tuple(
        LayerChange(
            layer.name,
            len(layer.labels),
            sum(root not in choice.gone for root in channels.roots(layer.labels)),
            why_stayed(channels, layer, choice),
        )
        for layer in channels.layers.values()
    )
    return Compaction(layers, num_parameters(model), num_parameters(model))


@torch.no_grad()
def check_outputs(model: nn.Module, small: nn.Module, arguments: tuple[Any, ...]) -> None:
    """The last word: the graph is a proof only as far as the model always runs that graph."""
    for inputs in (arguments, tree_map(random_like, arguments)):
        with evaluating(model), evaluating(small):
            expected = tree_leaves(model(*inputs))
            try:
                got = tree_leaves(small(*inputs))
            except Exception as error:
                raise RuntimeError(
                    "the model does not run with fewer channels, so it is left as it was: its "
                    f"code holds a number of channels that is no layer's attribute. {error}"
                ) from error
        for large, little in zip(expected, got, strict=True):
            if isinstance(large, Tensor) and not same(large, little):
                raise RuntimeError(
                    "the compacted model gives other outputs, so the model is left as it was; it "
                    "may draw random numbers or hold NaN in evaluation"
                )


def random_like(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    random = torch.Generator().manual_seed(0)
    return torch.randn(value.shape, generator=random).to(value)


def same(expected: Tensor, got: Tensor) -> bool:
    if expected.shape != got.shape or not expected.is_floating_point():
        return torch.equal(expected, got)
    if not expected.numel():
        return True
    shares = TOLERANCE_CUDA if expected.is_cuda else TOLERANCE
    allowed = shares.get(expected.dtype, TOLERANCE_16_BIT) * expected.abs().amax()
    return bool((expected - got).abs().amax() <= allowed)
