"""Activations, gradients and factors that every implementation of the channel switch must take."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fastprune.ops import reference
from tests.ops.machine import print_digest

SHAPES = [
    (2, 3), (1, 1), (7, 100), (300, 70), (1, 1, 5), (3, 1, 7), (5, 33, 7, 7), (9, 12, 1, 1),
    (2, 5, 129), (9, 4, 3, 5), (2, 2, 200, 101), (3, 4, 2, 2, 2), (16, 65, 9), (2, 1100, 6),
    (0, 3, 2), (2, 0, 2), (2, 3, 0),
]  # fmt: skip


def channels_last(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def reversed_dimensions(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))


def with_gaps(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


LAYOUTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": torch.randn,
    "channels_last": channels_last,
    "reversed": reversed_dimensions,
    "with gaps": with_gaps,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    scale_dtype: torch.dtype
    per_example: bool

    @property
    def label(self) -> str:
        sizes = "x".join(map(str, self.shape))
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in (self.dtype, self.scale_dtype))
        return f"{sizes}, {self.layout}, {dtypes}{', per example' if self.per_example else ''}"

    def build(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Gradient (always contiguous), input, scale with factors of either sign and zeros."""
        torch.manual_seed(len(self.label))
        grad, input = torch.randn(self.shape), LAYOUTS[self.layout](self.shape)
        scale = torch.randn(self.shape[:2] if self.per_example else self.shape[1:2])
        scale[..., ::3] = 0
        return (
            grad.to(device, self.dtype),
            input.to(device, self.dtype),
            scale.to(device, self.scale_dtype),
        )


def all_cases() -> Iterator[Case]:
    """Every shape in every layout and dtype; the scale's own dtype and form take turns."""
    wide = (torch.float32, torch.float64)
    for i, (shape, layout, dtype) in enumerate(product(SHAPES, LAYOUTS, DTYPES)):
        for per_example in (False, True):
            yield Case(shape, layout, dtype, wide[(i + per_example) % 2], per_example)


CASES = list(all_cases())


def assert_right(case: Case, output: Tensor, grad_input: Tensor, grad_scale: Tensor) -> None:
    """Products to the bit; sums within what their terms can lose to rounding."""
    grad, input, scale = case.build(output.device)
    expected = reference.channel_switch(input, scale)
    expected_input, expected_scale = reference.channel_switch_backward(grad, input, scale)
    for ours, wanted in ((output, expected), (grad_input, expected_input)):
        assert ours.dtype == wanted.dtype and ours.stride() == wanted.stride()
        assert torch.equal(ours, wanted)
    assert grad_scale.dtype == scale.dtype and grad_scale.stride() == expected_scale.stride()
    wide = case.dtype == case.scale_dtype == torch.float64
    magnitudes = reference.channel_switch_backward(grad.abs(), input.abs(), scale)[1].double()
    difference = (grad_scale.double() - expected_scale.double()).abs()
    assert (difference <= (1e-14 if wide else 2e-6) * magnitudes).all()


def results(case: Case) -> dict[str, Tensor]:
    grad, input, scale = case.build()
    output = torch.ops.fastprune.channel_switch(input, scale)
    grads = torch.ops.fastprune.channel_switch_backward(grad, input, scale)
    return {"output": output, "grad_input": grads[0], "grad_scale": grads[1]}


if __name__ == "__main__":
    print_digest(results(case) for case in CASES)
