"""Cases of the channel switch: beside one multiplication per channel, and one broadcast."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

import fastprune as fp

from .case import Case, Prepare, WrongAnswerError
from .shapes import DTYPES

# Batch, channels, height, width: the issue's, a WideResNet's, an early layer's, a linear layer's.
SHAPES = {
    "32x256x16x16": (32, 256, 16, 16),
    "128x640x8x8": (128, 640, 8, 8),
    "32x64x56x56": (32, 64, 56, 56),
    "512x4096": (512, 4096),
    "tiny": (3, 5, 7, 7),
}
BY_CHANNEL = "32x256x16x16"  # where multiplying channel by channel is measured: it takes seconds


@dataclass(frozen=True)
class Inputs:
    input: Tensor
    grad: Tensor
    scale: Tensor


Switch = Callable[[Tensor, Tensor], Tensor]


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device, seed: int
) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input, grad = (
        torch.randn(shape, generator=random, device=device).to(dtype, memory_format=layout)
        for _ in range(2)
    )
    scale = torch.rand(shape[1], generator=random, device=device)
    return Inputs(input, grad, scale)


def broadcast(input: Tensor, scale: Tensor) -> Tensor:
    """In the activation's precision: with a float32 scale the product would be float32."""
    return input * scale.to(input.dtype).view(-1, *[1] * (input.dim() - 2))


def by_channel(input: Tensor, scale: Tensor) -> Tensor:
    """The published loop, which writes one channel after the other.

    It multiplies in place, which autograd refuses today; here it reads the untouched input.
    """
    output = torch.empty_like(input)
    for channel in range(input.shape[1]):
        output[:, channel] = input[:, channel] * scale[channel]
    return output


def forward(switch: Switch) -> Prepare:
    return lambda inputs: lambda: [switch(inputs.input, inputs.scale)]


def backward(switch: Switch) -> Prepare:
    """Only the backward pass, of a graph that is kept."""

    def prepare(inputs: Inputs) -> Callable[[], list[Tensor]]:
        leaves = inputs.input.requires_grad_(), inputs.scale.requires_grad_()
        output = switch(*leaves)
        return lambda: list(torch.autograd.grad(output, leaves, inputs.grad, retain_graph=True))

    return prepare


def expected(direction: str, inputs: Inputs) -> list[Tensor]:
    """In float64; for sums, beside them, those of the terms' magnitudes."""
    input, grad = inputs.input.detach().double(), inputs.grad.double()
    factors = inputs.scale.detach().double().view(-1, *[1] * (input.dim() - 2))
    if direction == "forward":
        return [input * factors]
    terms = (input * grad).transpose(0, 1).flatten(1)
    return [grad * factors, terms.sum(1), terms.abs().sum(1)]


def check(wanted: list[Tensor], answer: list[Tensor]) -> None:
    products, dtype = answer[0].detach().double(), answer[0].dtype
    # A rival's factors are of 16 bits where its activations are, and so are its sums.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    if ((products - wanted[0]).abs() > tolerance * wanted[0].abs()).any():
        raise WrongAnswerError("products differ")
    if len(answer) > 1:
        sums, right, magnitudes = answer[1].double(), *wanted[1:]
        if ((sums - right).abs() > tolerance * magnitudes).any():
            raise WrongAnswerError("sums by channel differ")


def _case(label: str, dtype: str, direction: str, channels_last: bool) -> Case:
    shape = SHAPES[label]
    elements = torch.Size(shape).numel()
    build = {"forward": forward, "backward": backward}[direction]
    rivals = {"torch broadcast": build(broadcast)}
    if label in (BY_CHANNEL, "tiny") and not channels_last:
        rivals["torch, channel by channel"] = build(by_channel)
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    return Case(
        name=f"channel_switch.{direction}/{label}{'.nhwc' if channels_last else ''}/{dtype}",
        make=partial(make_inputs, shape, DTYPES[dtype], channels_last),
        function=build(fp.ops.channel_switch),
        rivals=rivals,
        expect=partial(expected, direction),
        check=check,
        reads=lambda inputs: [inputs.input, *([inputs.grad] if direction == "backward" else [])],
        bytes_moved=elements * size * (2 if direction == "forward" else 3),
        flops=elements * (1 if direction == "forward" else 3),
    )


def definitions() -> Iterator[Case]:
    for label, direction, dtype in product(SHAPES, ("forward", "backward"), DTYPES):
        yield _case(label, dtype, direction, False)
        if len(SHAPES[label]) == 4 and label != "tiny":
            yield _case(label, dtype, direction, True)
