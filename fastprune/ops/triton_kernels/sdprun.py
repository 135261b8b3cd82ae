"""SDprun's update of row groups in Triton; `reference/sdprun.py` specifies it.

A program takes a few rows: it steps them tile by tile, adds the squares in 128 lanes a row, and
goes over the rows again, which it has just written and so finds in a cache, to write the weights:
16 bytes of memory traffic a float32 parameter. A tensor that is not pruned is cut into rows whose
norm nobody asks for. The number of launches depends on the dtypes in the list, not on its length.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.sdprun import LANES, PROGRESS, SETTINGS
from .select import STORAGE, _layout, _on_device

ROWS = 8  # of a program: two for each of its warps
PLAIN_ROW = 4096  # elements of a tensor that is not pruned
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
Kind = tuple[torch.dtype, torch.dtype, torch.dtype]  # of accumulator, gradient and weight

# Columns of the table of tensors, int64 each; an address of 0 stands for what is not there.
_ACCUMULATOR = tl.constexpr(0)
_MOMENTUM = tl.constexpr(1)
_WEIGHT = tl.constexpr(2)
_GRADIENT = tl.constexpr(3)
_NUMEL = tl.constexpr(4)
_SIZE = tl.constexpr(5)  # of a row
_NUM_ROWS = tl.constexpr(6)
_FIRST_GROUP = tl.constexpr(7)
_ROW = tl.constexpr(8)  # of settings and progress
_COLUMNS = tl.constexpr(9)

_LANES = tl.constexpr(LANES)
_LR = tl.constexpr(SETTINGS.index("lr"))
_BETA = tl.constexpr(SETTINGS.index("momentum"))
_MAXIMIZE = tl.constexpr(SETTINGS.index("maximize"))
_SCALE = tl.constexpr(SETTINGS.index("scale"))
_SETTINGS = tl.constexpr(len(SETTINGS))
_THRESHOLD = tl.constexpr(PROGRESS.index("threshold"))
_PROGRESS = tl.constexpr(len(PROGRESS))


@triton.jit
def _step(entry, offset, inside, settings, grad_scale, GRADIENT: tl.constexpr, WIDE: tl.constexpr):
    """Accumulators after the arithmetic of torch.optim.SGD, which memory gets too."""
    accumulators = tl.load(entry + _ACCUMULATOR).to(tl.pointer_type(WIDE))
    v = tl.load(accumulators + offset, mask=inside, other=0.0)
    if tl.load(entry + _GRADIENT) != 0:
        gradients = tl.load(entry + _GRADIENT).to(tl.pointer_type(GRADIENT))
        d = tl.load(gradients + offset, mask=inside, other=0.0).to(WIDE)
        factor = tl.where(tl.load(settings + _MAXIMIZE) != 0, -1.0, 1.0).to(tl.float64)
        if grad_scale is not None:
            factor = factor / tl.load(grad_scale).to(tl.float64)
        d = d * factor.to(WIDE)
        if tl.load(entry + _MOMENTUM) != 0:
            momenta = tl.load(entry + _MOMENTUM).to(tl.pointer_type(WIDE))
            z = tl.load(momenta + offset, mask=inside, other=0.0)
            d = z * tl.load(settings + _BETA).to(WIDE) + d
            tl.store(momenta + offset, d, mask=inside)
        v = tl.fma(d, (-tl.load(settings + _LR)).to(WIDE), v)
        tl.store(accumulators + offset, v, mask=inside)
    return v


@triton.jit
def _narrowed(x, TO: tl.constexpr):
    """Rounded to nearest even, which the interpreter's conversion to bfloat16 does not do."""
    if TO.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TO)


@triton.jit
def _sum_of_lanes(sums, ROWS: tl.constexpr):
    """Lanes j and j + 64 are added, then j and j + 32, and so on."""
    for level in tl.static_range(7):
        sums = tl.sum(tl.reshape(sums, (ROWS, 2, 64 >> level)), 1)
    return tl.reshape(sums, (ROWS,))


@triton.jit
def _shrink_rows_kernel(
    tensors,
    programs,
    norms,
    progress,
    settings,
    grad_scale,
    found_inf,
    WIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Steps rows, then writes them as weights, shrunk by their norms."""
    skipped = 0.0 if found_inf is None else tl.load(found_inf)
    if skipped != 0:
        return
    program = programs + tl.program_id(0).to(tl.int64) * 2
    entry = tensors + tl.load(program) * _COLUMNS
    row = tl.load(program + 1) * ROWS + tl.arange(0, ROWS)
    size = tl.load(entry + _SIZE)
    numel = tl.load(entry + _NUMEL)
    settings += tl.load(entry + _ROW) * _SETTINGS
    lane = tl.arange(0, _LANES)[None, :]
    begin = row[:, None] * size

    sums = tl.zeros((ROWS, _LANES), tl.float64)
    first = tl.zeros_like(size)
    while first < size:  # the interpreter has no range() of a number from memory
        offset = begin + first + lane
        inside = (first + lane < size) & (offset < numel)
        v = _step(entry, offset, inside, settings, grad_scale, GRADIENT, WIDE)
        wide = v.to(tl.float64)
        sums += wide * wide
        first += _LANES
    norm = tl.sqrt(_sum_of_lanes(sums, ROWS))

    first_group = tl.load(entry + _FIRST_GROUP)
    pruned = row < 0
    factor = tl.full((ROWS,), 1.0, tl.float64)
    if first_group >= 0:
        tl.store(norms + first_group + row, norm, mask=row < tl.load(entry + _NUM_ROWS))
        eta = tl.where(tl.load(settings + _SCALE) != 0, tl.sqrt(size.to(tl.float64)), 1.0)
        step = tl.load(progress + tl.load(entry + _ROW) * _PROGRESS + _THRESHOLD)
        threshold = eta * step
        pruned = norm <= tl.where(threshold > 0, threshold, -1.0)
        factor = tl.where(threshold == 0, 1.0, 1.0 - threshold / norm)
    tl.debug_barrier()  # other threads may read what this one wrote
    accumulators = tl.load(entry + _ACCUMULATOR).to(tl.pointer_type(WIDE))
    weights = tl.load(entry + _WEIGHT).to(tl.pointer_type(WEIGHT))
    first = tl.zeros_like(size)
    while first < size:
        offset = begin + first + lane
        inside = (first + lane < size) & (offset < numel)
        v = tl.load(accumulators + offset, mask=inside & (pruned == 0)[:, None], other=0.0)
        scaled = tl.where(pruned[:, None], 0.0, v * factor.to(WIDE)[:, None])
        tl.store(weights + offset, _narrowed(scaled, WEIGHT), mask=inside)
        first += _LANES


def sdprun_update_(
    accumulators: Sequence[Tensor],
    momenta: Sequence[Tensor],
    weights: Sequence[Tensor],
    norms: Tensor,
    gradients: Sequence[Tensor],
    progress: Tensor,
    settings: Tensor,
    rows: Sequence[int],
    first_groups: Sequence[int],
    column_groups: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The Triton twin of the operator, for layers of one tensor whose groups are its rows."""
    _check_rows(weights, first_groups, column_groups)
    table: list[list[int]] = []
    kinds: list[Kind] = []
    for i, weight in enumerate(weights):
        accumulator = accumulators[i] if accumulators[i].numel() else weight
        gradient = gradients[i] if gradients[i].numel() else None
        momentum = momenta[i] if momenta and momenta[i].numel() else None
        for other in (accumulator, gradient, momentum):
            if other is not None and _layout(other) != _layout(weight):
                raise ValueError(f"every tensor must have the shape and strides of weights[{i}]")
        pruned = first_groups[i] >= 0
        num_rows = weight.shape[0] if pruned else triton.cdiv(weight.numel(), PLAIN_ROW)
        table.append([
            accumulator.data_ptr(),
            0 if momentum is None else momentum.data_ptr(),
            weight.data_ptr(),
            0 if gradient is None else gradient.data_ptr(),
            weight.numel(),
            weight.numel() // max(1, num_rows) if pruned else PLAIN_ROW,
            num_rows,
            first_groups[i],
            rows[i],
        ])  # fmt: skip
        gradient_dtype = accumulator.dtype if gradient is None else gradient.dtype
        kinds.append((accumulator.dtype, gradient_dtype, weight.dtype))
    with torch.cuda.device_of(norms):
        tensors, programs = _programs(table, kinds, norms.device)
        for kind, of_kind in programs.items():
            wide, narrow_gradient, narrow_weight = (STORAGE[dtype] for dtype in kind)
            _shrink_rows_kernel[(len(of_kind),)](
                tensors,
                of_kind,
                norms,
                progress,
                settings,
                grad_scale,
                found_inf,
                WIDE=wide,
                GRADIENT=narrow_gradient,
                WEIGHT=narrow_weight,
                ROWS=ROWS,
                **OPTIONS,
            )


def _programs(
    table: list[list[int]], kinds: list[Kind], device: torch.device
) -> tuple[Tensor, dict[Kind, Tensor]]:
    """The table on the device, and for each kind its programs: tensor, number within it."""
    parts = {kind: [torch.empty(0, 2, dtype=torch.int64)] for kind in dict.fromkeys(kinds)}
    for i, (entry, kind) in enumerate(zip(table, kinds, strict=True)):
        number = torch.arange(triton.cdiv(entry[_NUM_ROWS.value], ROWS))
        parts[kind].append(torch.stack([torch.full_like(number, i), number], 1))
    lists = [torch.cat(part).flatten() for part in parts.values()]
    tensors, *on_device = _on_device([torch.tensor(table).flatten(), *lists], device)
    by_kind = zip(parts, (programs.view(-1, 2) for programs in on_device), strict=True)
    return tensors, {kind: programs for kind, programs in by_kind if len(programs)}


def _check_rows(
    weights: Sequence[Tensor], first_groups: Sequence[int], column_groups: Sequence[int]
) -> None:
    """What the kernel cannot address; the registered operator does all of it."""
    before = -1
    for i, weight in enumerate(weights):
        if first_groups[i] >= 0 and weight.shape[0]:
            if column_groups[i] or first_groups[i] == before:
                raise ValueError(
                    f"weights[{i}] must be a layer of its own whose groups are its rows, got "
                    f"column_groups={column_groups[i]} and first_group={first_groups[i]} after "
                    f"{before}; torch.ops.fastprune.sdprun_update_ takes the others"
                )
            before = first_groups[i]
            outermost = weight.shape[0] == 1 or weight.stride(0) * weight.shape[0] == weight.numel()
            if weight.numel() and not outermost:
                raise ValueError(
                    f"weights[{i}] must have dimension 0 outermost in memory, got shape "
                    f"{tuple(weight.shape)} with strides {weight.stride()}; call .contiguous()"
                )
