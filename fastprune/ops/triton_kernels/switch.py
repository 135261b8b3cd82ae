"""The channel switch in Triton; `reference/switch.py` specifies it.

An activation is `groups` blocks of [rows, width]: channels are rows, the same in every block, or,
channels-last, they are columns, with factors of their own in each block. The backward kernel writes
the sums of each of its tiles and a second, small sum adds those up, both in an order that the shape
alone decides.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sdprun import _narrowed

TILE = 1024  # elements that a program holds at once: 8 for each thread
NUM_WARPS = 4
WIDEST = 256  # of columns
STEPS = 16  # at most so many tiles of columns, one below the other, has a program
# A product and a following sum are two roundings, as in every other implementation.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


@triton.jit
def _rows_kernel(
    source,
    input,
    scale,
    result,
    sums,
    num_rows,
    num_scales,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Rows of one channel each; row i has factor i modulo their number."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(width, WIDTH)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    column = program % tiles * WIDTH + tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    offset = row[:, None] * width + column[None, :]
    WIDE: tl.constexpr = scale.dtype.element_ty
    factor = tl.load(scale + row % num_scales, mask=row < num_rows, other=0.0)
    x = tl.load(source + offset, mask=inside, other=0.0).to(WIDE)
    tl.store(result + offset, _narrowed(x * factor[:, None], result.dtype.element_ty), mask=inside)
    if BACKWARD:
        products = x * tl.load(input + offset, mask=inside, other=0.0).to(WIDE)
        tl.store(sums + row * tiles + program % tiles, tl.sum(products, 1), mask=row < num_rows)


@triton.jit
def _columns_kernel(
    source,
    input,
    scale,
    result,
    sums,
    num_rows,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Rows with an element of every channel; every block of rows has its own factors."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, WIDTH)
    down = tl.cdiv(num_rows, ROWS * STEPS)
    group = program // (across * down)
    part = program // across % down
    column = program % across * WIDTH + tl.arange(0, WIDTH)
    there = column < width
    WIDE: tl.constexpr = scale.dtype.element_ty
    factor = tl.load(scale + group * width + column, mask=there, other=0.0)
    total = tl.zeros((ROWS, WIDTH), WIDE)
    for step in range(STEPS):
        row = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & there[None, :]
        offset = (group * num_rows + row)[:, None] * width + column[None, :]
        x = tl.load(source + offset, mask=inside, other=0.0).to(WIDE)
        tl.store(
            result + offset, _narrowed(x * factor[None, :], result.dtype.element_ty), mask=inside
        )
        if BACKWARD:
            total += x * tl.load(input + offset, mask=inside, other=0.0).to(WIDE)
    if BACKWARD:
        target = sums + (group * down + part) * width + column
        tl.store(target, tl.sum(total, 0), mask=there)


class _Shape(NamedTuple):
    """An activation in memory, and how it is cut into tiles."""

    columns: bool
    groups: int
    rows: int
    width: int

    @property
    def tile(self) -> tuple[int, int]:
        limit = WIDEST if self.columns else TILE
        width = min(triton.next_power_of_2(self.width), limit)
        return TILE // width, width

    @property
    def steps(self) -> int:
        """Tiles that a program of columns sums up; few different numbers, as each is compiled."""
        return min(STEPS, triton.next_power_of_2(triton.cdiv(self.rows, self.tile[0])))


def channel_switch(input: Tensor, scale: Tensor) -> Tensor:
    """The Triton kernel of the operator."""
    if not input.numel():
        return torch.empty_like(input)
    ready, columns = _prepared(input)
    result = torch.empty_like(ready)
    _launch(_shape(ready, columns, scale), ready, None, scale, result)
    return _laid_out_for(input, result)


def channel_switch_backward(grad: Tensor, input: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton kernel of the operator."""
    if not input.numel():
        return torch.empty_like(input), scale.new_zeros(scale.shape)
    ready, columns = _prepared(input)
    source = grad if grad.stride() == ready.stride() else torch.empty_like(ready).copy_(grad)
    result = torch.empty_like(ready)
    shape = _shape(ready, columns, scale)
    sums = _launch(shape, source, ready, scale, result)
    if columns:
        by_channel = sums.sum(1)
    else:
        by_channel = sums.view(-1, scale.numel(), sums.shape[-1]).sum((0, 2))
    return _laid_out_for(input, result), by_channel.reshape(scale.shape).to(scale.dtype)


def _launch(
    shape: _Shape, source: Tensor, input: Tensor | None, scale: Tensor, result: Tensor
) -> Tensor:
    """Returns the sums of all tiles: [groups, tiles, width] of columns, or [rows, tiles]."""
    rows, width = shape.tile
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    factors = scale.to(wide).contiguous()
    across = triton.cdiv(shape.width, width)
    options = {"ROWS": rows, "WIDTH": width, "BACKWARD": input is not None, **OPTIONS}
    with torch.cuda.device_of(source):
        if shape.columns:
            down = triton.cdiv(shape.rows, rows * shape.steps)
            sums = factors.new_empty(shape.groups, down, shape.width)
            _columns_kernel[(shape.groups * down * across,)](
                source, input, factors, result, sums, shape.rows, shape.width,
                STEPS=shape.steps, **options,
            )  # fmt: skip
        else:
            sums = factors.new_empty(shape.rows, across)
            _rows_kernel[(triton.cdiv(shape.rows, rows) * across,)](
                source, input, factors, result, sums, shape.rows, factors.numel(), shape.width,
                **options,
            )  # fmt: skip
    return sums


def _shape(input: Tensor, columns: bool, scale: Tensor) -> _Shape:
    channels = input.shape[1]
    if not columns:
        num_rows = input.shape[0] * channels
        return _Shape(False, 1, num_rows, input.numel() // num_rows)
    groups = input.shape[0] if scale.dim() == 2 else 1
    return _Shape(True, groups, input.numel() // channels // groups, channels)


def _prepared(input: Tensor) -> tuple[Tensor, bool]:
    """A dense tensor, and whether its channels are innermost. A single channel is a row."""
    channels_last = input.shape[1] > 1 and input.movedim(1, -1).is_contiguous()
    return (input, True) if channels_last else (input.contiguous(), False)


def _laid_out_for(input: Tensor, result: Tensor) -> Tensor:
    """In the layout that every implementation gives its result."""
    strides = torch.empty_like(input, device="meta").stride()
    if result.stride() == strides:
        return result
    return torch.empty_like(input).copy_(result)
