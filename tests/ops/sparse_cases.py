"""Random convolutions and small programs for the operator that runs a region of a network."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.ops.reference.sparse import Activation, Kernel, Kind, Step, sparse_rows

KEYS = count(1 << 61)
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
FUNCTIONS = {
    Activation.NONE: lambda x: x,
    Activation.RELU: F.relu,
    Activation.RELU6: F.relu6,
    Activation.HARDSWISH: F.hardswish,
    Activation.SILU: F.silu,
    Activation.HARDSIGMOID: F.hardsigmoid,
    Activation.SIGMOID: torch.sigmoid,
}


@dataclass(frozen=True)
class Convolution:
    """One convolution: [batch, inputs, height, width] -> outputs channels."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    sparsity: float
    blocks: int  # zeros come in blocks of as many outputs
    activation: int
    residual: bool
    channels_last: bool
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.batch, self.inputs, self.height, self.width, generator=generator)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        shape = (self.outputs, self.inputs // self.groups, *self.kernel)
        weight = torch.randn(shape, generator=generator)
        rows = -(-self.outputs // self.blocks)
        kept = torch.rand(rows, *shape[1:], generator=generator) >= self.sparsity
        weight *= kept.repeat_interleave(self.blocks, 0)[: self.outputs]
        return x, weight, torch.randn(self.outputs, generator=generator)

    def step(self, kernel: Kernel) -> Step:
        return Step(
            Kind.CONV,
            2 if self.residual else 1,
            0,
            1 if self.residual else -1,
            0,
            *self.kernel,
            *self.stride,
            *self.padding,
            *self.dilation,
            self.groups,
            self.activation,
            kernel,
        )

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Sequence[Tensor]) -> Any:
        """PyTorch's own, and how large the terms are that it adds up; both in float64."""
        shape = (self.stride, self.padding, self.dilation, self.groups)
        y = F.conv2d(x.double(), weight.double(), bias.double(), *shape)
        size = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), *shape)
        for each in residual:
            y, size = y + each.double(), size + each.double().abs()
        return FUNCTIONS[Activation(self.activation)](y), size


def convolutions(number: int, seed: int = 0) -> Iterator[Convolution]:
    """Sizes that are multiples of nothing, every kind of zeros, all that a step can say."""
    pick = random.Random(seed)
    while number:
        groups = pick.choice([1, 1, 1, 2, 3])
        depthwise = pick.random() < 0.15
        inputs = pick.randint(1, 40) if depthwise else groups * pick.randint(1, 24)
        outputs = inputs * pick.randint(1, 2) if depthwise else groups * pick.randint(1, 40)
        height, width = pick.randint(1, 23), pick.randint(1, 37)
        kernel = pick.choice([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 3), (3, 2)])
        stride = pick.choice([(1, 1), (1, 1), (2, 2), (2, 1), (3, 3)])
        dilation = pick.choice([(1, 1), (1, 1), (1, 1), (2, 2), (1, 2)])
        padding = pick.choice([(0, 0), (k // 2 for k in kernel), (2, 1), (0, 3)])
        case = Convolution(
            batch=pick.choice([1, 1, 2, 3, 5, 16, 17, 33]),
            inputs=inputs,
            outputs=outputs,
            height=height,
            width=width,
            kernel=kernel,
            stride=stride,
            padding=tuple(padding),
            dilation=dilation,
            groups=inputs if depthwise else groups,
            sparsity=pick.choice(SPARSITIES),
            blocks=pick.choice([1, 1, 4, 8, 16]),
            activation=pick.randint(0, 6),
            residual=pick.random() < 0.3,
            channels_last=pick.random() < 0.3,
            seed=pick.randint(0, 1 << 30),
        )
        sizes = zip(dilation, kernel, case.padding, strict=True)
        reach = [d * (k - 1) + 1 - 2 * p for d, k, p in sizes]
        if height >= reach[0] and width >= reach[1]:
            number -= 1
            yield case


def program(*steps: Step) -> list[int]:
    return [number for step in steps for number in step]


def packed(weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [*sparse_rows(weight.flatten(1)), bias]


def convolve(case: Convolution, kernel: Kernel, function: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator gives, PyTorch's answer, and the sizes that its rounding scales with."""
    x, weight, bias = case.tensors()
    step = case.step(kernel)
    residual = []
    if case.residual:
        shape = F.conv2d(
            x, weight, None, case.stride, case.padding, case.dilation, case.groups
        ).shape
        residual = [torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))]
    code = program(step, Step(Kind.OUTPUT, first=step.out))
    (got,) = function([x, *residual], packed(weight, bias), code, next(KEYS))
    return got, *case.expected(x, weight, bias, residual)
