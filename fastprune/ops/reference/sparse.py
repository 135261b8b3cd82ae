"""A region of a network as one operator: a short program of convolutions and what is around them.

Weights are sparse rows: row `o` of a layer's outputs has the values and columns from
`row_starts[o]` up to `row_starts[o + 1]`, where column (c * kernel_height + i) * kernel_width + j
stands for input channel c of the row's group and tap (i, j). Columns ascend in a row.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Kind(IntEnum):
    """What a step computes from its slots `first` and `second`."""

    CONV = 0  # [+ second] after the bias; weights: values, columns, row_starts, bias
    LINEAR = 1  # the same on a slot of one pixel
    MAX_POOL = 2
    AVERAGE_POOL = 3
    GLOBAL_AVERAGE_POOL = 4
    ADD = 5
    AFFINE = (
        6  # weights: scale, shift, one number per channel; without weights the activation alone
    )
    CONCAT = 7  # along the channels
    OUTPUT = 8  # `first` is a result
    SCALE = 9  # first * second, where second has one pixel


class Activation(IntEnum):
    """Applied last, but not by pools and outputs."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    HARDSWISH = 3
    SILU = 4
    HARDSIGMOID = 5
    SIGMOID = 6


class Kernel(IntEnum):
    """How a convolution is computed; the result does not depend on it beyond rounding."""

    AUTOMATIC = 0
    ROWS = 1
    BLOCKED_ROWS = 2
    GENERATED = 3


CEIL_MODE, COUNT_INCLUDE_PAD, FLATTEN = 1, 2, 4  # flags of pools, of average pools, of outputs


class Step(NamedTuple):
    """A row of a program: 18 integers."""

    kind: int
    out: int = -1
    first: int = -1
    second: int = -1
    weights: int = -1
    kernel_height: int = 1
    kernel_width: int = 1
    stride_height: int = 1
    stride_width: int = 1
    pad_height: int = 0
    pad_width: int = 0
    dilation_height: int = 1
    dilation_width: int = 1
    groups: int = 1
    activation: int = 0
    kernel: int = 0
    flags: int = 0
    reserved: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.kernel_height, self.kernel_width

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_height, self.stride_width

    @property
    def padding(self) -> tuple[int, int]:
        return self.pad_height, self.pad_width

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_height, self.dilation_width


COLUMNS = len(Step._fields)

ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: F.relu,
    Activation.RELU6: F.relu6,
    Activation.HARDSWISH: F.hardswish,
    Activation.SILU: F.silu,
    Activation.HARDSIGMOID: F.hardsigmoid,
    Activation.SIGMOID: torch.sigmoid,
}


def sparse_network(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], program: Sequence[int], key: int
) -> list[Tensor]:
    """Runs a program on [N, C, H, W] or [N, C] inputs and returns what its outputs name.

    Slots 0 to len(inputs) - 1 are the inputs, where [N, C] counts as [N, C, 1, 1]; every other step
    fills a new one. A step finds its tensors in `weights` from the index it names on. Results are
    new contiguous tensors, [N, C] for an output with the flag FLATTEN. `key` names what an
    implementation keeps from call to call under it, until `sparse_release`: the weights and the
    program of a key never change.
    """
    run = Run(inputs, weights)
    for step in steps(program):
        run(step)
    return run.outputs


def sparse_profile(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], program: Sequence[int], key: int
) -> Tensor:
    """The seconds that each step takes in a run of `sparse_network`, float64.

    Bringing an input into another layout counts for the first step that reads it, bringing a
    result back for its output step, and steps that run as one for the last of them.
    """
    run, seconds = Run(inputs, weights), []
    for step in steps(program):
        start = perf_counter()
        run(step)
        seconds.append(perf_counter() - start)
    return torch.tensor(seconds, dtype=torch.float64)


def sparse_release(place: Tensor, key: int) -> None:
    """Forgets what is kept under `key` for the device of `place`: here nothing."""


class Run:
    """One run of a program, step by step."""

    def __init__(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.slots = {i: x[:, :, None, None] if x.dim() == 2 else x for i, x in enumerate(inputs)}
        self.outputs: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        x = self.slots[step.first]
        if step.kind == Kind.OUTPUT:
            x = x.flatten(1) if step.flags & FLATTEN else x
            self.outputs.append(x.clone(memory_format=torch.contiguous_format))
        else:
            x = before_activation(
                step, x, self.slots.get(step.second), self.weights[step.weights :]
            )
            self.slots[step.out] = ACTIVATIONS[step.activation](x)


def steps(program: Sequence[int]) -> list[Step]:
    return [Step(*program[i : i + COLUMNS]) for i in range(0, len(program), COLUMNS)]


def before_activation(
    step: Step, x: Tensor, second: Tensor | None, weights: Sequence[Tensor]
) -> Tensor:
    if step.kind in (Kind.CONV, Kind.LINEAR):
        columns = x.shape[1] // step.groups * step.kernel_height * step.kernel_width
        values, index, row_starts, bias = weights[:4]
        weight = dense_rows(values, index, row_starts, columns).unflatten(1, (-1, *step.size))
        x = F.conv2d(x, weight, bias, step.stride, step.padding, step.dilation, step.groups)
        return x if second is None else x + second
    if step.kind == Kind.MAX_POOL:
        ceil_mode = bool(step.flags & CEIL_MODE)
        return F.max_pool2d(x, step.size, step.stride, step.padding, step.dilation, ceil_mode)
    if step.kind == Kind.AVERAGE_POOL:
        ceil_mode, with_pad = bool(step.flags & CEIL_MODE), bool(step.flags & COUNT_INCLUDE_PAD)
        return F.avg_pool2d(x, step.size, step.stride, step.padding, ceil_mode, with_pad)
    if step.kind == Kind.GLOBAL_AVERAGE_POOL:
        return x.mean((2, 3), keepdim=True)
    if step.kind == Kind.AFFINE:
        if step.weights < 0:
            return x
        scale, shift = (each[:, None, None] for each in weights[:2])
        return x * scale + shift
    if second is None:
        raise ValueError(f"step {Kind(step.kind).name} needs a second slot, got {step.second}")
    if step.kind == Kind.ADD:
        return x + second
    if step.kind == Kind.CONCAT:
        return torch.cat([x, second], 1)
    if step.kind == Kind.SCALE:
        return x * second
    raise ValueError(f"there is no step of kind {step.kind}")


def dense_rows(values: Tensor, columns: Tensor, row_starts: Tensor, num_columns: int) -> Tensor:
    """The matrix whose sparse rows these are."""
    position = torch.arange(values.shape[0], dtype=torch.int32, device=values.device)
    row = torch.bucketize(position, row_starts[1:], right=True)
    dense = values.new_zeros(row_starts.shape[0] - 1, num_columns)
    return dense.index_put((row, columns.long()), values)


def sparse_rows(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, columns and row starts of the elements of a matrix that are not zero."""
    row, column = dense.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=dense.shape[0])
    row_starts = F.pad(counts.cumsum(0), (1, 0)).int()
    return dense[row, column], column.int(), row_starts
