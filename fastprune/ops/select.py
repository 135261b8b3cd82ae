"""Exact top-k selection over a list of tensors that are never concatenated."""

from collections.abc import Sequence
from math import prod
from operator import index
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .reference.select import NAN_SEEN

Score = Literal["value", "magnitude", "saliency"]
Tensors = Sequence[Tensor]

SCORED = {"value": "scores", "magnitude": "weights", "saliency": "weight * gradient"}
HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.float64, *HALF)


class Selection(NamedTuple):
    """The k best scores as a rule on the device: all above `threshold`, and of those equal to it
    the `num_ties` first ones, which are those at positions below `tie_end`."""

    threshold: Tensor
    num_ties: Tensor
    tie_end: Tensor
    non_finite: Tensor  # 1: an infinity was seen, 2: a NaN, 3: both


def global_topk(
    scores: Tensors,
    num_kept: int | Tensor,
    *,
    score: Score = "value",
    gradients: Tensors | None = None,
) -> Selection:
    """The `num_kept` best of all elements of a list of tensors, found where the tensors are.

    `score` is "value" (the tensors are scores of any sign), "magnitude" (|w|) or "saliency"
    (|w * g|, with `gradients`), formed in float32 (float64 for float64 tensors). Ties go to the
    lowest position; positions count row-major elements in list order whatever the memory format.
    `num_kept` may be a 0-d int64 tensor on the device; it is then clamped to 0..N, not read.
    """
    values, pairs = _checked_lists(scores, gradients, score)
    k = _one_count(num_kept, sum(v.numel() for v in values), _device_of(values))
    return _select(values, pairs, k, score)


def layer_topk(
    scores: Tensors,
    nums_kept: Sequence[int] | Tensor,
    *,
    score: Score = "value",
    gradients: Tensors | None = None,
) -> Selection:
    """Like `global_topk`, but in each tensor on its own: `nums_kept` has one count per tensor."""
    values, pairs = _checked_lists(scores, gradients, score)
    k = _many_counts(nums_kept, [v.numel() for v in values], _device_of(values))
    return _select(values, pairs, k, score)


def global_topk_masks(
    scores: Tensors,
    num_kept: int | Tensor,
    *,
    score: Score = "value",
    gradients: Tensors | None = None,
    block: tuple[int, int] = (1, 1),
) -> list[Tensor]:
    """Boolean masks of exactly the `num_kept` best elements over all tensors, True where kept.

    With `block=(outputs, inputs)` scores are summed over blocks of the first two dimensions (at
    each kernel position of a convolution; blocks at the edges may be smaller) and `num_kept`
    counts blocks. See `global_topk` for `score`, ties and a `num_kept` on the device.
    """
    values, pairs = _checked_lists(scores, gradients, score)
    elements, pairs, kind, what = _blocked(values, pairs, score, block)
    k = _one_count(num_kept, sum(v.numel() for v in elements), _device_of(values))
    return _expanded(_masks(elements, pairs, k, kind, what), values, block)


def layer_topk_masks(
    scores: Tensors,
    nums_kept: Sequence[int] | Tensor,
    *,
    score: Score = "value",
    gradients: Tensors | None = None,
    block: tuple[int, int] = (1, 1),
) -> list[Tensor]:
    """Like `global_topk_masks`, but in each tensor on its own: one count per tensor."""
    values, pairs = _checked_lists(scores, gradients, score)
    elements, pairs, kind, what = _blocked(values, pairs, score, block)
    k = _many_counts(nums_kept, [v.numel() for v in elements], _device_of(values))
    return _expanded(_masks(elements, pairs, k, kind, what), values, block)


class PoolChoice(NamedTuple):
    """Which elements of a pool of weights are selected: by a rule, or by one bool per block."""

    threshold: Tensor
    tie_end: Tensor
    gates: list[Tensor] | None


def select_pool(
    weights: list[Tensor], gradients: list[Tensor], num_kept: Tensor, block: tuple[int, int]
) -> PoolChoice:
    """The `num_kept` largest saliencies, for operators that apply the choice themselves.

    For optimizers: nothing is checked and nothing is read from the device.
    """
    ops = torch.ops.fastprune
    if block == (1, 1):
        threshold, _, tie_end, _ = ops.select_threshold(weights, gradients, num_kept, "saliency")
        return PoolChoice(threshold, tie_end, None)
    sums = ops.block_scores(weights, gradients, "saliency", block)
    threshold, _, tie_end, _ = ops.select_threshold(sums, [], num_kept, "value")
    return PoolChoice(threshold, tie_end, ops.select_masks(sums, [], threshold, tie_end, "value"))


def _select(
    values: Tensors, gradients: Tensors, num_kept: Tensor, score: Score, what: str = ""
) -> Selection:
    result = torch.ops.fastprune.select_threshold(values, gradients, num_kept, score)
    selection = Selection(*result)
    _raise_on_nan(selection, what or SCORED[score])
    return selection


def _masks(
    values: Tensors, gradients: Tensors, num_kept: Tensor, score: Score, what: str
) -> list[Tensor]:
    chosen = _select(values, gradients, num_kept, score, what)
    masks: list[Tensor] = torch.ops.fastprune.select_masks(
        values, gradients, chosen.threshold, chosen.tie_end, score
    )
    return masks


def _blocked(
    values: list[Tensor], gradients: list[Tensor], score: Score, block: tuple[int, int]
) -> tuple[list[Tensor], list[Tensor], Score, str]:
    """What the selection chooses among, elements or the sums of blocks, and what to call it."""
    outputs, inputs = checked_block(block)
    if (outputs, inputs) == (1, 1):
        return values, gradients, score, SCORED[score]
    for i, value in enumerate(values):
        if value.dim() < 2:
            raise ValueError(
                f"scores[{i}] has {value.dim()} dimensions, but blocks of (outputs, inputs) need "
                "at least 2; leave vectors out of the list or use block=(1, 1)"
            )
    sums = torch.ops.fastprune.block_scores(values, gradients, score, [outputs, inputs])
    return sums, [], "value", f"a block's sum of {SCORED[score]}"


def _expanded(masks: list[Tensor], values: Tensors, block: tuple[int, int]) -> list[Tensor]:
    """Block masks repeated over the elements of their blocks."""
    outputs, inputs = block
    if (outputs, inputs) == (1, 1):
        return masks
    expanded = []
    for mask, value in zip(masks, values, strict=True):
        rows = mask.repeat_interleave(outputs, 0)[: value.shape[0]]
        elements = rows.repeat_interleave(inputs, 1)[:, : value.shape[1]]
        expanded.append(torch.empty_like(value, dtype=torch.bool).copy_(elements))
    return expanded


def _raise_on_nan(selection: Selection, what: str) -> None:
    """Reads one flag from the device, so it is left out where that is impossible."""
    flag = selection.non_finite
    if torch.compiler.is_compiling():
        return
    if flag.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if int(flag) & NAN_SEEN:
        raise ValueError(
            f"{what} must not be NaN, but at least one is; look for the step that diverged "
            "(torch.autograd.detect_anomaly), or replace NaNs with torch.nan_to_num"
        )


def _checked_lists(
    values: Tensors, gradients: Tensors | None, score: Score
) -> tuple[list[Tensor], list[Tensor]]:
    """Detached dense tensors; each gradient laid out like its weight."""
    if score not in SCORED:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORED))}, got {score!r}")
    _check_tensors("scores", values)
    if (gradients is None) == (score == "saliency"):
        raise ValueError(
            "gradients go with score='saliency' and only with it; got "
            f"score={score!r} and gradients={'None' if gradients is None else 'a list'}"
        )
    dense = [_dense(v.detach()) for v in values]
    if gradients is None:
        return dense, []
    _check_tensors("gradients", gradients)
    _check_pairs(values, gradients)
    return dense, [laid_out_like(g.detach(), v) for g, v in zip(gradients, dense, strict=True)]


def _check_tensors(name: str, tensors: Tensors) -> None:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"{name} must be a list or tuple of tensors, got {type(tensors).__name__}; "
            f"for one tensor pass [{name}], for a generator list({name})"
        )
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name}[{i}] must be float32, float64, bfloat16 or float16, got {tensor.dtype}; "
                "convert it with .float()"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{name}[{i}] must be a dense tensor, got layout {tensor.layout}; use .to_dense()"
            )
        first = tensors[0]
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must all be on one device: {name}[0] is on {first.device}, "
                f"{name}[{i}] on {tensor.device}"
            )
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(
                f"{name} must be all float64 or none: {name}[0] is {first.dtype}, "
                f"{name}[{i}] {tensor.dtype}"
            )


def _check_pairs(values: Tensors, gradients: Tensors) -> None:
    if len(gradients) != len(values):
        raise ValueError(
            f"gradients must have one tensor per weight, got {len(gradients)} for {len(values)}"
        )
    for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        # The float32 master of a 16-bit parameter goes with the parameter's gradient.
        master = value.dtype == torch.float32 and gradient.dtype in HALF
        for what in ("shape", "device") if master else ("shape", "dtype", "device"):
            if getattr(gradient, what) != getattr(value, what):
                raise ValueError(
                    f"gradients[{i}] must have the {what} of its weight, {getattr(value, what)}, "
                    f"got {getattr(gradient, what)}"
                )


def num_blocks(shape: Sequence[int], block: tuple[int, int]) -> int:
    """Blocks at the edges may be smaller than the others."""
    outputs, inputs = block
    return -(-shape[0] // outputs) * -(-shape[1] // inputs) * prod(shape[2:])


def checked_block(block: tuple[int, int]) -> tuple[int, int]:
    try:
        outputs, inputs = map(index, block)
    except (TypeError, ValueError):
        raise TypeError(f"block must be two integers (outputs, inputs), got {block!r}") from None
    if outputs < 1 or inputs < 1:
        raise ValueError(f"block must be two positive integers (outputs, inputs), got {block!r}")
    return outputs, inputs


def _one_count(num_kept: int | Tensor, total: int, device: torch.device) -> Tensor:
    if isinstance(num_kept, Tensor):
        return _device_count("num_kept", num_kept, (), device)
    return torch.tensor(_host_count("num_kept", num_kept, total), device=device)


def _many_counts(
    nums_kept: Sequence[int] | Tensor, sizes: list[int], device: torch.device
) -> Tensor:
    if isinstance(nums_kept, Tensor):
        return _device_count("nums_kept", nums_kept, (len(sizes),), device)
    if not isinstance(nums_kept, Sequence) or isinstance(nums_kept, str):
        raise TypeError(
            "nums_kept must be a list of integers or an int64 tensor, one count per tensor, got "
            f"{type(nums_kept).__name__}"
        )
    if len(nums_kept) != len(sizes):
        raise ValueError(
            f"nums_kept must have one count per tensor, got {len(nums_kept)} for {len(sizes)}"
        )
    counts = [
        _host_count(f"nums_kept[{i}]", k, size)
        for i, (k, size) in enumerate(zip(nums_kept, sizes, strict=True))
    ]
    return torch.tensor(counts, dtype=torch.int64, device=device)


def _host_count(name: str, count: int, total: int) -> int:
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise TypeError(
            f"{name} must be an integer or an int64 tensor, got {type(count).__name__} {count!r}; "
            "it is a count, not a fraction"
        )
    count = index(count)
    if not 0 <= count <= total:
        raise ValueError(f"{name} must be in 0..{total} (the number of scores), got {count}")
    return count


def _device_count(name: str, count: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if count.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {count.dtype}")
    if tuple(count.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(count.shape)}")
    if count.device != device:
        raise ValueError(f"{name} must be on the scores' device {device}, got {count.device}")
    return count


def _device_of(values: Tensors) -> torch.device:
    return values[0].device if values else torch.device("cpu")


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself when its elements fill a stretch of memory in some order of dimensions."""
    if tensor.is_contiguous():
        return tensor
    if tensor.dim() > 5:  # more than the kernels describe
        return tensor.contiguous()
    expected = 1
    dims = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in dims:
        if size != 1:
            if stride != expected:
                return tensor.contiguous()
            expected *= size
    return tensor


def laid_out_like(tensor: Tensor, model: Tensor) -> Tensor:
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)
