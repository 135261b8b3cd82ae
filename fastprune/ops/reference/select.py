"""Exact top-k selection over a list of tensors: the specification, in plain PyTorch.

A score is formed for every element: the value itself (`"value"`), its magnitude |w|
(`"magnitude"`) or the saliency |w * g| (`"saliency"`, GSM's T(w)), in float32, or in float64 for
float64 tensors. Scores are ordered as numbers with -0.0 equal to +0.0 and NaN above infinity. Among
equal scores the lowest position wins; positions count row-major elements in list order.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

INFINITY_SEEN = 1
NAN_SEEN = 2


def element_scores(value: Tensor, gradient: Tensor | None, score: str) -> Tensor:
    """Scores of one tensor in its own shape; -0.0 becomes +0.0."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    result = value.to(dtype)
    if score == "saliency":
        assert gradient is not None
        result = result * gradient.to(dtype)
    return result + 0.0 if score == "value" else result.abs()


def order_keys(scores: Tensor) -> Tensor:
    """int64 keys in the order of the scores; every NaN has one key, above that of infinity."""
    bits_dtype = torch.int64 if scores.dtype == torch.float64 else torch.int32
    bits = scores.contiguous().view(bits_dtype)
    low_bits = torch.iinfo(bits_dtype).max
    keys = torch.where(bits < 0, bits ^ low_bits, bits)
    return torch.where(scores.isnan(), low_bits, keys).to(torch.int64)


def _select(scores: Tensor, num_kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, number of kept ties and tie end of one flat segment."""
    size = scores.numel()
    if size == 0:
        zero = torch.zeros_like(num_kept)
        return scores.new_full((), torch.nan), zero, zero
    keys = order_keys(scores)
    descending = keys.argsort(descending=True, stable=True)
    num_kept = num_kept.clamp(0, size)
    kth = descending.take(num_kept.sub(1).clamp(min=0))
    # Nothing exceeds NaN in this order, so keeping nothing is a threshold of NaN.
    threshold = scores.take(kth).where(num_kept > 0, torch.nan)
    threshold_key = order_keys(threshold)
    num_ties = num_kept - (keys > threshold_key).sum()
    tie_end = ((keys == threshold_key).cumsum(0) <= num_ties).sum()
    return threshold, num_ties, tie_end


def select_threshold(
    values: Sequence[Tensor], gradients: Sequence[Tensor], num_kept: Tensor, score: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The num_kept-th largest score, over all tensors (0-d num_kept) or in each (1-d num_kept).

    Returns (threshold, num_ties, tie_end, non_finite), shaped like num_kept but for the last.
    The selection is: every score above the threshold, and of those equal to it the num_ties that
    come first, which are those at positions below tie_end (the first dropped one, or the size).
    """
    scores = _flat_scores(values, gradients, score)
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    everything = torch.cat([num_kept.new_empty(0, dtype=dtype), *scores])
    segments = scores if num_kept.dim() else [everything]
    counts = num_kept.reshape(-1).unbind()
    rows = [_select(s, k) for s, k in zip(segments, counts, strict=True)]
    if rows:
        threshold, num_ties, tie_end = (
            torch.stack(column).reshape(num_kept.shape) for column in zip(*rows, strict=True)
        )
    else:
        threshold, num_ties, tie_end = everything, num_kept.clone(), num_kept.clone()
    non_finite = everything.isinf().any() * INFINITY_SEEN + everything.isnan().any() * NAN_SEEN
    return threshold, num_ties, tie_end, non_finite.to(torch.int32)


def select_masks(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    threshold: Tensor,
    tie_end: Tensor,
    score: str,
) -> list[Tensor]:
    """True where an element belongs to the selection that (threshold, tie_end) describes."""
    scores = _flat_scores(values, gradients, score)
    starts = [0, *accumulate(s.numel() for s in scores)]
    masks = []
    for i, (value, s) in enumerate(zip(values, scores, strict=True)):
        segmented = threshold.dim() > 0
        limit = order_keys(threshold[i] if segmented else threshold)
        end = tie_end[i] if segmented else tie_end - starts[i]
        keys = order_keys(s)
        position = torch.arange(s.numel(), device=s.device)
        kept = (keys > limit) | ((keys == limit) & (position < end))
        masks.append(torch.empty_like(value, dtype=torch.bool).copy_(kept.view(value.shape)))
    return masks


def block_scores(
    values: Sequence[Tensor], gradients: Sequence[Tensor], score: str, block: Sequence[int]
) -> list[Tensor]:
    """Sums of scores over blocks of (outputs, inputs), at each kernel position for convolutions.

    The order of the additions is part of the definition, since masks must agree to the bit: first
    down the outputs of each input column, then along the block's inputs, each from zero.
    """
    outputs, inputs = block
    sums = []
    for i, value in enumerate(values):
        scores = element_scores(value, gradients[i] if gradients else None, score)
        rows, columns = -(-scores.shape[0] // outputs), -(-scores.shape[1] // inputs)
        padded = scores.new_zeros(rows * outputs, columns * inputs, *scores.shape[2:])
        padded[: scores.shape[0], : scores.shape[1]] = scores
        tiles = padded.view(rows, outputs, columns, inputs, *scores.shape[2:])
        column_sums = _ordered_sum(tiles, 1)
        sums.append(_ordered_sum(column_sums, 2))
    return sums


def _ordered_sum(x: Tensor, dim: int) -> Tensor:
    total = torch.zeros_like(x.select(dim, 0), memory_format=torch.contiguous_format)
    for part in x.unbind(dim):
        total += part
    return total


def _flat_scores(values: Sequence[Tensor], gradients: Sequence[Tensor], score: str) -> list[Tensor]:
    return [
        element_scores(v, gradients[i] if gradients else None, score).reshape(-1)
        for i, v in enumerate(values)
    ]
