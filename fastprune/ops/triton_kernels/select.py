"""Exact top-k selection over a list of tensors in Triton; `reference/select.py` specifies it.

A score becomes an unsigned key of equal order. Its bits are fixed digit by digit, the highest
first: count the digits of the keys that match so far, pick the digit that holds the num_kept-th
largest, go on below it. What is left are equal keys, of which the first in row-major order win.

Tensors are reached through a table of addresses, so nothing is concatenated and the number of
launches depends on the dtypes in the list, not on its length. Nothing is read back to the host.
The table is copied to the device in each call, which is why a call belongs outside of CUDA graphs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program's share of a tensor: 8 elements for each thread, so that several programs fit on one
# multiprocessor. Ties are counted by share, so it is also the stretch searched for the last one.
CHUNK = 2048
NUM_WARPS = 8
PICK_WARPS = 16  # one program holds all bins
BLOCK_CHUNK = 512  # block scores take addresses and two sums for each element
DIGIT_BITS = 12  # sign, exponent and some mantissa of a float32 in the first digit
BINS = 1 << DIGIT_BITS
# Copies of the one histogram of a global selection, so that programs with similar scores do not
# wait at the same counter. Segments have a histogram each, which are many and apart enough.
GLOBAL_REPLICAS = 16
# A product and a following sum are two roundings, as in every other implementation.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
PICK_OPTIONS = {**OPTIONS, "num_warps": PICK_WARPS}

STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# Columns of the table of tensors, int64 each.
_VALUE = tl.constexpr(0)
_GRADIENT = tl.constexpr(1)
_RESULT = tl.constexpr(2)
_NUMEL = tl.constexpr(3)
_SEGMENT = tl.constexpr(4)
_FIRST_POSITION = tl.constexpr(5)  # in the segment
_FIRST_CHUNK = tl.constexpr(6)  # of the segment
_PERMUTED = tl.constexpr(7)  # memory order is not row-major order
_SIZES = tl.constexpr(8)
_MEMORY_STRIDES = tl.constexpr(12)
_POSITION_STRIDES = tl.constexpr(16)
_OUTPUTS = tl.constexpr(20)  # the first two dimensions, for blocks
_INPUTS = tl.constexpr(21)
_TAPS = tl.constexpr(22)  # positions of a convolution's kernel
_COLUMNS = tl.constexpr(23)
# Dimensions that are neighbours in both orders count as one: channels-last needs three.
_LAYOUT_DIMS = tl.constexpr(4)
_CHUNK_COLUMNS = tl.constexpr(2)  # tensor, number of the chunk in its tensor


@triton.jit
def _reordered(row, index, FROM: tl.constexpr, TO: tl.constexpr):
    """Row-major positions of memory offsets, or the other way round."""
    result = tl.zeros_like(index)
    for d in tl.static_range(_LAYOUT_DIMS):
        coordinate = (index // tl.load(row + FROM + d)) % tl.load(row + _SIZES + d)
        result += coordinate * tl.load(row + TO + d)
    return result


@triton.jit
def _score_at(row, offset, inside, STORAGE: tl.constexpr, SCORE: tl.constexpr):
    """Scores before the magnitude is taken; the product is one rounded multiplication."""
    WIDE: tl.constexpr = tl.float64 if STORAGE.primitive_bitwidth == 64 else tl.float32
    values = tl.load(row + _VALUE).to(tl.pointer_type(STORAGE))
    score = tl.load(values + offset, mask=inside, other=0.0).to(WIDE)
    if SCORE == "saliency":
        gradients = tl.load(row + _GRADIENT).to(tl.pointer_type(STORAGE))
        score *= tl.load(gradients + offset, mask=inside, other=0.0).to(WIDE)
    return score


@triton.jit
def _order_key(score, SCORE: tl.constexpr):
    """Unsigned integers in the order of the scores; -0.0 is 0.0, and every NaN the largest key.

    Bits without the sign are the order of magnitudes. All is done by integers, so denormals stay.
    """
    DOUBLE: tl.constexpr = score.dtype == tl.float64
    SIGN: tl.constexpr = 0x8000000000000000 if DOUBLE else 0x80000000
    INFINITY: tl.constexpr = 0xFFE0000000000000 if DOUBLE else 0xFF000000  # doubled bits
    NAN_KEY: tl.constexpr = 0xFFFFFFFFFFFFFFFF if DOUBLE else 0xFFFFFFFF
    bits = score.to(tl.uint64 if DOUBLE else tl.uint32, bitcast=True)
    doubled = bits << 1
    key = doubled
    if SCORE == "value":
        bits = tl.where(doubled == 0, 0, bits)
        key = tl.where(bits >= SIGN, bits ^ NAN_KEY, bits | SIGN)
    return tl.where(doubled > INFINITY, NAN_KEY, key).to(doubled.dtype)


@triton.jit
def _score_of_key(key, SCORE: tl.constexpr):
    """The inverse of `_order_key`."""
    DOUBLE: tl.constexpr = key.dtype == tl.uint64
    SIGN: tl.constexpr = 0x8000000000000000 if DOUBLE else 0x80000000
    NAN_KEY: tl.constexpr = 0xFFFFFFFFFFFFFFFF if DOUBLE else 0xFFFFFFFF
    QUIET_NAN: tl.constexpr = 0x7FF8000000000000 if DOUBLE else 0x7FC00000
    bits = key >> 1
    if SCORE == "value":
        bits = tl.where(key >= SIGN, key ^ SIGN, key ^ NAN_KEY)
    bits = tl.where(key == NAN_KEY, QUIET_NAN, bits).to(key.dtype)
    if DOUBLE:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _non_finite_flags(score):
    """1 for an infinity, 2 for a NaN."""
    infinite = tl.max((tl.abs(score) == float("inf")).to(tl.int32), 0)
    nan = tl.max((score != score).to(tl.int32), 0)
    return infinite + 2 * nan


@triton.jit
def _tensor_of(tensors, chunks, chunk, CHUNK: tl.constexpr):
    """The chunk's row in the table, the numbers of its elements and which of them exist."""
    chunk_row = chunks + chunk * _CHUNK_COLUMNS
    row = tensors + tl.load(chunk_row) * _COLUMNS
    index = tl.load(chunk_row + 1) * CHUNK + tl.arange(0, CHUNK)
    return row, index, index < tl.load(row + _NUMEL)


@triton.jit(do_not_specialize=["shift", "digit_bits", "first_digit"])
def _histogram_kernel(
    tensors,
    chunks,
    order,
    prefixes,
    histogram,
    non_finite,
    shift,
    digit_bits,
    first_digit,
    STORAGE: tl.constexpr,
    SCORE: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    REPLICAS: tl.constexpr,
):
    """Counts one digit of the keys that begin with their segment's prefix."""
    program = tl.program_id(0).to(tl.int64)
    row, offset, inside = _tensor_of(tensors, chunks, tl.load(order + program), CHUNK)
    score = _score_at(row, offset, inside, STORAGE, SCORE)
    if first_digit != 0:
        flags = _non_finite_flags(score)
        tl.atomic_or(non_finite, flags, mask=flags != 0, sem="relaxed")
    key = _order_key(score, SCORE)
    segment = tl.load(row + _SEGMENT)
    upper = key >> shift
    prefix = tl.load(prefixes + segment).to(key.dtype)
    candidate = inside & ((upper >> digit_bits) == prefix)
    digit = (upper & ((1 << digit_bits) - 1)).to(tl.int32)
    bins = histogram + (segment * REPLICAS + program % REPLICAS) * BINS
    # Zeros are the one score that is common everywhere (dead units): one addition for all.
    zero = candidate & (score == 0.0)
    tl.atomic_add(bins + digit, 1, mask=candidate & (zero == 0), sem="relaxed")
    num_zeros = tl.sum(zero.to(tl.int32), 0)
    zero_digit = tl.max(tl.where(zero, digit, 0), 0)
    tl.atomic_add(bins + zero_digit, num_zeros, mask=num_zeros > 0, sem="relaxed")


@triton.jit(do_not_specialize=["digit_bits"])
def _pick_kernel(
    histogram,
    prefixes,
    remaining,
    num_equal,
    digit_bits,
    BINS: tl.constexpr,
    REPLICAS: tl.constexpr,
):
    """Appends to a segment's prefix the digit that holds the element sought.

    `remaining` becomes its rank among the keys with the longer prefix and `num_equal` their number.
    The histogram is left empty for the next digit.
    """
    segment = tl.program_id(0).to(tl.int64)
    digit = BINS - 1 - tl.arange(0, BINS)
    bins = histogram + segment * REPLICAS * BINS + digit
    counts = tl.zeros((BINS,), tl.int64)
    for replica in range(REPLICAS):
        counts += tl.load(bins + replica * BINS)
        tl.store(bins + replica * BINS, 0)
    rank = tl.load(remaining + segment)
    above = tl.cumsum(counts, 0) < rank
    # With rank 0 the digit is the largest, each time: nothing exceeds the key that results, NaN's.
    chosen = BINS - 1 - tl.sum(above.to(tl.int32), 0)
    chosen = tl.minimum(chosen, (1 << digit_bits) - 1)
    prefix = tl.load(prefixes + segment)
    tl.store(prefixes + segment, (prefix << digit_bits) | chosen)
    tl.store(remaining + segment, rank - tl.sum(tl.where(above, counts, 0), 0))
    tl.store(num_equal + segment, tl.sum(tl.where(digit == chosen, counts, 0), 0))


@triton.jit
def _threshold_kernel(keys, threshold, SCORE: tl.constexpr):
    """The scores of the keys that were found."""
    segment = tl.program_id(0).to(tl.int64)
    KEY: tl.constexpr = tl.uint64 if threshold.dtype.element_ty == tl.float64 else tl.uint32
    key = tl.load(keys + segment).to(KEY)
    tl.store(threshold + segment, _score_of_key(key, SCORE))


@triton.jit
def _ties_in_order(row, position, inside, keys, STORAGE: tl.constexpr, SCORE: tl.constexpr):
    """Which elements of a row-major stretch equal the threshold."""
    offset = position
    if tl.load(row + _PERMUTED) != 0:
        offset = _reordered(row, position, _POSITION_STRIDES, _MEMORY_STRIDES)
    key = _order_key(_score_at(row, offset, inside, STORAGE, SCORE), SCORE)
    return inside & (key == tl.load(keys + tl.load(row + _SEGMENT)).to(key.dtype))


@triton.jit
def _count_ties_kernel(
    tensors,
    chunks,
    order,
    keys,
    num_ties,
    num_equal,
    chunk_ties,
    STORAGE: tl.constexpr,
    SCORE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Counts the ties of each row-major chunk, unless all ties of its segment are kept."""
    chunk = tl.load(order + tl.program_id(0).to(tl.int64))
    row, position, inside = _tensor_of(tensors, chunks, chunk, CHUNK)
    segment = tl.load(row + _SEGMENT)
    if tl.load(num_ties + segment) < tl.load(num_equal + segment):
        tie = _ties_in_order(row, position, inside, keys, STORAGE, SCORE)
        tl.store(chunk_ties + chunk, tl.sum(tie.to(tl.int32), 0))


@triton.jit
def _locate_tie_kernel(
    tensors,
    chunks,
    order,
    keys,
    num_ties,
    num_equal,
    chunk_ties,
    ties_through,
    tie_end,
    STORAGE: tl.constexpr,
    SCORE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """In the one chunk that holds a segment's first dropped tie: its position."""
    chunk = tl.load(order + tl.program_id(0).to(tl.int64))
    row, position, inside = _tensor_of(tensors, chunks, chunk, CHUNK)
    segment = tl.load(row + _SEGMENT)
    kept = tl.load(num_ties + segment)
    first = tl.load(row + _FIRST_CHUNK)
    before_segment = tl.load(ties_through + first) - tl.load(chunk_ties + first)
    through = tl.load(ties_through + chunk) - before_segment
    before = through - tl.load(chunk_ties + chunk)
    # Where all ties are kept none was counted, and this is false in every chunk.
    if (before <= kept) & (kept < through):
        tie = _ties_in_order(row, position, inside, keys, STORAGE, SCORE)
        dropped = tie & (before + tl.cumsum(tie.to(tl.int32), 0) == kept + 1)
        found = tl.sum(tl.where(dropped, position, 0), 0)
        tl.store(tie_end + segment, tl.load(row + _FIRST_POSITION) + found)


@triton.jit
def _mask_kernel(
    tensors,
    chunks,
    order,
    threshold,
    tie_end,
    STORAGE: tl.constexpr,
    SCORE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """True above the threshold, and at it for positions before the tie end."""
    chunk = tl.load(order + tl.program_id(0).to(tl.int64))
    row, offset, inside = _tensor_of(tensors, chunks, chunk, CHUNK)
    segment = tl.load(row + _SEGMENT)
    limit = _order_key(tl.load(threshold + segment), SCORE)
    end = tl.load(tie_end + segment) - tl.load(row + _FIRST_POSITION)
    position = offset
    # Positions cost divisions, so only where the tie end falls into a tensor that needs them.
    if (tl.load(row + _PERMUTED) != 0) & (end > 0) & (end < tl.load(row + _NUMEL)):
        position = _reordered(row, offset, _MEMORY_STRIDES, _POSITION_STRIDES)
    key = _order_key(_score_at(row, offset, inside, STORAGE, SCORE), SCORE)
    kept = (key > limit) | ((key == limit) & (position < end))
    masks = tl.load(row + _RESULT).to(tl.pointer_type(tl.int8))
    tl.store(masks + offset, kept.to(tl.int8), mask=inside)


@triton.jit
def _block_scores_kernel(
    tensors,
    chunks,
    order,
    STORAGE: tl.constexpr,
    SCORE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Sums each input column down its outputs, then the columns: an order that masks depend on."""
    chunk = tl.load(order + tl.program_id(0).to(tl.int64))
    row, index, inside = _tensor_of(tensors, chunks, chunk, CHUNK)
    num_outputs = tl.load(row + _OUTPUTS)
    num_inputs = tl.load(row + _INPUTS)
    num_columns = (num_inputs + BLOCK_INPUTS - 1) // BLOCK_INPUTS
    num_taps = tl.load(row + _TAPS)
    tap = index % num_taps
    first_input = index // num_taps % num_columns * BLOCK_INPUTS
    first_output = index // num_taps // num_columns * BLOCK_OUTPUTS
    WIDE: tl.constexpr = tl.float64 if STORAGE.primitive_bitwidth == 64 else tl.float32
    total = tl.zeros((CHUNK,), WIDE)
    for i in range(BLOCK_INPUTS):
        column_total = tl.zeros((CHUNK,), WIDE)
        for o in range(BLOCK_OUTPUTS):
            here = inside & (first_output + o < num_outputs) & (first_input + i < num_inputs)
            offset = ((first_output + o) * num_inputs + first_input + i) * num_taps + tap
            if tl.load(row + _PERMUTED) != 0:
                offset = _reordered(row, offset, _POSITION_STRIDES, _MEMORY_STRIDES)
            score = _score_at(row, offset, here, STORAGE, SCORE)
            column_total += score if SCORE == "value" else tl.abs(score)
        total += column_total
    sums = tl.load(row + _RESULT).to(tl.pointer_type(WIDE))
    tl.store(sums + index, total, mask=inside)


@dataclass(frozen=True)
class _Tables:
    """What the kernels see of a list of tensors, in one int64 tensor on the device."""

    tensors: Tensor
    chunks: Tensor
    segment_sizes: Tensor
    orders: dict[torch.dtype, Tensor]  # the chunks of each dtype


def _tables(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    outputs: Sequence[Tensor],
    device: torch.device,
    segmented: bool,
    chunk: int = CHUNK,
) -> _Tables:
    """Programs share the elements of the outputs, or of the values where there are none."""
    numels = [t.numel() for t in outputs or values]
    num_chunks = [triton.cdiv(n, chunk) for n in numels]
    first_positions = [0, *accumulate(numels)]
    first_chunks = [0, *accumulate(num_chunks)]
    rows = [
        [
            value.data_ptr(),
            gradients[i].data_ptr() if gradients else 0,
            outputs[i].data_ptr() if outputs else 0,
            numels[i],
            i if segmented else 0,
            0 if segmented else first_positions[i],
            first_chunks[i] if segmented else 0,
            *_layout(value),
            *_block_dims(value),
        ]
        for i, value in enumerate(values)
    ]
    owner = torch.arange(len(values)).repeat_interleave(torch.tensor(num_chunks, dtype=torch.int64))
    number = torch.arange(len(owner)) - torch.tensor(first_chunks)[owner]
    codes = torch.tensor([list(STORAGE).index(v.dtype) for v in values], dtype=torch.int64)[owner]
    orders = [(codes == code).nonzero().flatten() for code in range(len(STORAGE))]
    sizes = numels if segmented else [sum(numels)]
    parts = [
        torch.tensor(rows, dtype=torch.int64).flatten(),
        torch.stack([owner, number], 1).flatten(),
        torch.tensor(sizes, dtype=torch.int64),
        *orders,
    ]
    tensors, chunks, segment_sizes, *orders = _on_device(parts, device)
    by_dtype = {d: o for d, o in zip(STORAGE, orders, strict=True) if o.numel()}
    return _Tables(tensors, chunks, segment_sizes, by_dtype)


def _on_device(parts: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """One copy for all; from pinned memory it does not make the host wait."""
    packed = torch.cat(parts)
    if device.type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return packed.split([part.numel() for part in parts])


def _layout(tensor: Tensor) -> list[int]:
    """Columns _PERMUTED to _POSITION_STRIDES: the dimensions, merged where memory allows it."""
    dims: list[tuple[int, int, int]] = []  # size, memory stride, position stride
    position_stride = 1
    for size, stride in reversed(list(zip(tensor.shape, tensor.stride(), strict=True))):
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, *dims[-1][1:])
        elif size != 1:
            dims.append((size, stride, position_stride))
        position_stride *= size
    if tensor.numel() == 0:
        dims = []
    _check_dense(tensor, dims)
    dims += [(1, 1, 1)] * (_LAYOUT_DIMS.value - len(dims))
    sizes, memory_strides, position_strides = zip(*dims, strict=True)
    permuted = int(memory_strides != position_strides)
    return [permuted, *sizes, *memory_strides, *position_strides]


def _block_dims(tensor: Tensor) -> list[int]:
    outputs, inputs, *taps = (*tensor.shape, 1, 1)[: max(2, tensor.dim())]
    return [outputs, inputs, prod(taps)]


def _check_dense(tensor: Tensor, dims: list[tuple[int, int, int]]) -> None:
    """The kernels walk memory, so a tensor must fill its stretch of it."""
    expected = 1
    for size, stride, _ in sorted(dims, key=lambda dim: dim[1]):
        expected = expected * size if stride == expected else 0
    if expected == 0 or len(dims) > _LAYOUT_DIMS.value:
        raise ValueError(
            f"values must be dense in memory, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; call .contiguous() on it"
        )


def _checked_score_dtype(
    values: Sequence[Tensor], gradients: Sequence[Tensor], score: str
) -> torch.dtype:
    """Only what would be an unsafe access; the public functions say more, and earlier."""
    if score not in ("value", "magnitude", "saliency"):
        raise ValueError(f"score must be 'value', 'magnitude' or 'saliency', got {score!r}")
    if len(gradients) != (len(values) if score == "saliency" else 0):
        raise ValueError(
            "gradients must have one tensor per value for score='saliency', else none; got "
            f"{len(gradients)} for {len(values)} values and score={score!r}"
        )
    for value in values:
        if value.dtype not in STORAGE:
            raise TypeError(
                f"values must be float32, float64, bfloat16 or float16, got {value.dtype}"
            )
    for i, (value, gradient) in enumerate(zip(values, gradients, strict=False)):
        same_strides = _layout(value) == _layout(gradient)
        if value.dtype != gradient.dtype or value.shape != gradient.shape or not same_strides:
            raise ValueError(
                f"gradients[{i}] must have the dtype, shape and strides of values[{i}]"
            )
    doubles = {v.dtype == torch.float64 for v in values}
    if len(doubles) == 2:
        raise ValueError("values must be all float64 or none")
    return torch.float64 if True in doubles else torch.float32


def _check_rule(name: str, tensor: Tensor, dtype: torch.dtype, num_values: int) -> None:
    """What the kernels index by segment."""
    if tensor.dtype != dtype or tuple(tensor.shape) not in ((), (num_values,)):
        raise ValueError(
            f"{name} must be {dtype} and have no dimension, or one with an entry for each of the "
            f"{num_values} values; got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def select_threshold(
    values: Sequence[Tensor], gradients: Sequence[Tensor], num_kept: Tensor, score: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton twin of the operator `select_threshold`."""
    dtype = _checked_score_dtype(values, gradients, score)
    _check_rule("num_kept", num_kept, torch.int64, len(values))
    shape, device = num_kept.shape, num_kept.device
    with torch.cuda.device_of(num_kept):
        tables = _tables(values, gradients, [], device, segmented=len(shape) > 0)
        num_segments = tables.segment_sizes.numel()
        threshold = torch.empty(num_segments, dtype=dtype, device=device)
        non_finite = torch.zeros((), dtype=torch.int32, device=device)
        ranks = torch.minimum(num_kept.reshape(-1).clamp(min=0), tables.segment_sizes)
        keys, num_ties, num_equal = _radix_select(tables, ranks, score, dtype, non_finite)
        tie_end = _tie_ends(tables, keys, num_ties, num_equal, score)
        if num_segments:
            _threshold_kernel[(num_segments,)](keys, threshold, SCORE=score, **OPTIONS)
    return threshold.view(shape), num_ties.view(shape), tie_end.view(shape), non_finite


def _digits(width: int) -> list[tuple[int, int]]:
    """(shift, bits) of the digits of a key, the highest first."""
    starts = range(width, 0, -DIGIT_BITS)
    return [(max(0, start - DIGIT_BITS), min(start, DIGIT_BITS)) for start in starts]


def _radix_select(
    tables: _Tables, ranks: Tensor, score: str, dtype: torch.dtype, non_finite: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In each segment the key of the given rank, the rank among its equals and their number."""
    keys, num_equal = torch.zeros_like(ranks), torch.zeros_like(ranks)
    num_segments = ranks.numel()
    if num_segments == 0:
        return keys, ranks, num_equal
    replicas = GLOBAL_REPLICAS if num_segments == 1 else 1
    histogram = ranks.new_zeros(num_segments, replicas, BINS)
    sizes = {"BINS": BINS, "REPLICAS": replicas}
    for i, (shift, bits) in enumerate(_digits(8 * dtype.itemsize)):
        for storage, order in tables.orders.items():
            _histogram_kernel[(order.numel(),)](
                tables.tensors,
                tables.chunks,
                order,
                keys,
                histogram,
                non_finite,
                shift,
                bits,
                int(i == 0),
                STORAGE=STORAGE[storage],
                SCORE=score,
                CHUNK=CHUNK,
                **sizes,
                **OPTIONS,
            )
        _pick_kernel[(num_segments,)](
            histogram, keys, ranks, num_equal, bits, **sizes, **PICK_OPTIONS
        )
    return keys, ranks, num_equal


def _tie_ends(
    tables: _Tables, keys: Tensor, num_ties: Tensor, num_equal: Tensor, score: str
) -> Tensor:
    """The position of each segment's first dropped tie; its size where none is dropped."""
    tie_end = tables.segment_sizes.clone()
    chunk_ties = keys.new_zeros(tables.chunks.numel() // _CHUNK_COLUMNS.value)
    common = (keys, num_ties, num_equal, chunk_ties)
    for dtype, order in tables.orders.items():
        _count_ties_kernel[(order.numel(),)](
            tables.tensors,
            tables.chunks,
            order,
            *common,
            STORAGE=STORAGE[dtype],
            SCORE=score,
            CHUNK=CHUNK,
            **OPTIONS,
        )
    ties_through = chunk_ties.cumsum(0)
    for dtype, order in tables.orders.items():
        _locate_tie_kernel[(order.numel(),)](
            tables.tensors,
            tables.chunks,
            order,
            *common,
            ties_through,
            tie_end,
            STORAGE=STORAGE[dtype],
            SCORE=score,
            CHUNK=CHUNK,
            **OPTIONS,
        )
    return tie_end


def select_masks(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    threshold: Tensor,
    tie_end: Tensor,
    score: str,
) -> list[Tensor]:
    """The Triton twin of the operator `select_masks`."""
    dtype = _checked_score_dtype(values, gradients, score)
    if values:
        _check_rule("threshold", threshold, dtype, len(values))
        _check_rule("tie_end", tie_end.expand(threshold.shape), torch.int64, len(values))
    rule = threshold.contiguous(), tie_end.expand(threshold.shape).contiguous()
    masks = [torch.empty_like(v, dtype=torch.bool) for v in values]
    with torch.cuda.device_of(threshold):
        tables = _tables(values, gradients, masks, threshold.device, threshold.dim() > 0)
        for storage, order in tables.orders.items():
            _mask_kernel[(order.numel(),)](
                tables.tensors,
                tables.chunks,
                order,
                *rule,
                STORAGE=STORAGE[storage],
                SCORE=score,
                CHUNK=CHUNK,
                **OPTIONS,
            )
    return masks


def block_scores(
    values: Sequence[Tensor], gradients: Sequence[Tensor], score: str, block: Sequence[int]
) -> list[Tensor]:
    """The Triton twin of the operator `block_scores`."""
    if not values:
        return []
    dtype = _checked_score_dtype(values, gradients, score)
    outputs, inputs = block
    sums = [
        v.new_empty(
            (triton.cdiv(v.shape[0], outputs), triton.cdiv(v.shape[1], inputs), *v.shape[2:]),
            dtype=dtype,
        )
        for v in values
    ]
    with torch.cuda.device_of(values[0]):
        tables = _tables(values, gradients, sums, values[0].device, False, BLOCK_CHUNK)
        for storage, order in tables.orders.items():
            _block_scores_kernel[(order.numel(),)](
                tables.tensors,
                tables.chunks,
                order,
                STORAGE=STORAGE[storage],
                SCORE=score,
                CHUNK=BLOCK_CHUNK,
                BLOCK_OUTPUTS=outputs,
                BLOCK_INPUTS=inputs,
                **OPTIONS,
            )
    return sums
