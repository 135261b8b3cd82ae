"""The tensors that the cases run on: shapes, data types, and what they are filled with."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resnet50() -> list[Shape]:
    """ResNet-50's 161 parameter tensors in torchvision's order: 25,557,032 elements."""
    return list(_resnet50())


def _resnet50() -> Iterator[Shape]:
    yield from _convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _convolution(width, inputs, 1)
            yield from _convolution(width, width, 3)
            yield from _convolution(4 * width, width, 1)
            if block == 0:
                yield from _convolution(4 * width, inputs, 1)
            inputs = 4 * width
    yield from ((1000, 2048), (1000,))


def _convolution(outputs: int, inputs: int, kernel: int) -> Iterator[Shape]:
    yield (outputs, inputs, kernel, kernel)
    yield from ((outputs,), (outputs,))  # batch norm


# Odd sizes, so that vector tails and ragged blocks run in the smoke tests too.
TINY: list[Shape] = [(33, 7, 3, 3), (33,), (17, 5), (1,), (64, 33, 1, 1), (127,)]


def elements350m() -> list[Shape]:
    """350 million elements: about a ViT-Large with a few hundred parameter tensors."""
    return [(1000, 1000)] * 350


def count(shapes: Sequence[Shape]) -> int:
    return sum(map(prod, shapes))


def random_weights(
    shapes: Sequence[Shape], dtype: torch.dtype, random: torch.Generator
) -> list[Tensor]:
    """As an initialisation scales them."""
    return [_normal(s, max(prod(s[1:]), 1) ** -0.5, dtype, random) for s in shapes]


def random_gradients(
    shapes: Sequence[Shape], dtype: torch.dtype, random: torch.Generator
) -> list[Tensor]:
    return [_normal(s, 1e-3, dtype, random) for s in shapes]


def _normal(shape: Shape, std: float, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Filled where it lies, on the generator's device."""
    return torch.empty(shape, dtype=dtype, device=random.device).normal_(0, std, generator=random)
