"""Cases of exact selection: the share `KEPT` of |w * g| or |w| over a list of tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

import fastprune as fp
from fastprune.ops import Selection, reference

from . import shapes
from .case import Case, Eager, WrongAnswerError
from .shapes import DTYPES, Shape

KEPT = 0.1
BLOCK = (16, 1)


@dataclass(frozen=True)
class Inputs:
    weights: list[Tensor]
    gradients: list[Tensor]  # empty for magnitudes
    num_kept: Tensor  # 0-d, or one per tensor; on the device so that calls can be captured

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.gradients]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the public functions."""
        if self.gradients:
            return {"score": "saliency", "gradients": self.gradients}
        return {"score": "magnitude"}


def make_inputs(
    shape_list: Sequence[Shape],
    dtype: torch.dtype,
    saliency: bool,
    counts: Sequence[int] | int,
    device: torch.device,
    seed: int,
) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    weights = shapes.random_weights(shape_list, dtype, random)
    gradients = shapes.random_gradients(shape_list, dtype, random) if saliency else []
    return Inputs(weights, gradients, torch.tensor(counts, device=device))


# The scores as a user forms them: float32, one flat tensor for all.


def tensor_scores(inputs: Inputs) -> list[Tensor]:
    if not inputs.gradients:
        return [w.float().abs() for w in inputs.weights]
    pairs = zip(inputs.weights, inputs.gradients, strict=True)
    return [(w.float() * g.float()).abs_() for w, g in pairs]


def concatenated(inputs: Inputs) -> Tensor:
    return torch.cat([s.view(-1) for s in tensor_scores(inputs)])


def kth_largest(scores: Tensor, k: int) -> Tensor:
    return scores.kthvalue(scores.numel() - k + 1).values


def topk_last(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k).values[-1]


def topk_unsorted(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k, sorted=False).values.amin()


def sorted_kth(scores: Tensor, k: int) -> Tensor:
    return scores.sort(descending=True).values[k - 1]


def numpy_partition(scores: Tensor, k: int) -> Tensor:
    array = scores.numpy()
    array.partition(scores.numel() - k)
    return scores[scores.numel() - k]


KthOf = Callable[[Tensor, int], Tensor]
KTH = {
    "cat + kthvalue": kth_largest,
    "cat + topk": topk_last,
    "cat + topk unsorted": topk_unsorted,
}
CPU_KTH = {"cat + numpy in-place partition": numpy_partition}
CUDA_KTH = {"cat + sort": sorted_kth}


def counts_of(inputs: Inputs) -> list[int]:
    """Counts on the host, as a rival in eager torch needs them: read before the timing."""
    return inputs.num_kept.reshape(-1).tolist()


# Threshold over all tensors


def our_threshold(inputs: Inputs) -> Callable[[], Selection]:
    return lambda: fp.global_topk(inputs.weights, inputs.num_kept, **inputs.options)


def rival_threshold(kth: KthOf, inputs: Inputs) -> Callable[[], Tensor]:
    (k,) = counts_of(inputs)
    return lambda: kth(concatenated(inputs), k)


def expected_of(scores: Tensor, k: int) -> tuple[float, int, int]:
    """(threshold, num_ties, tie_end) of one flat segment, by kthvalue and counting."""
    threshold = kth_largest(scores, k)
    num_ties = k - int((scores > threshold).sum())
    ties = (scores == threshold).nonzero().view(-1)
    tie_end = int(ties[num_ties]) if num_ties < ties.numel() else scores.numel()
    return float(threshold), num_ties, tie_end


def expected_threshold(inputs: Inputs) -> list[tuple[float, int, int]]:
    return [expected_of(concatenated(inputs), counts_of(inputs)[0])]


def triton_threshold(inputs: Inputs) -> Eager:
    """The other implementation of select_threshold; the faster of the two is the winner."""
    from fastprune.ops import triton_kernels

    score = inputs.options["score"]

    def run() -> Selection:
        return Selection(
            *triton_kernels.select_threshold(
                inputs.weights, inputs.gradients, inputs.num_kept, score
            )
        )

    return Eager(run)


# Threshold in each tensor


def our_layer_threshold(inputs: Inputs) -> Callable[[], Selection]:
    return lambda: fp.layer_topk(inputs.weights, inputs.num_kept, **inputs.options)


def rival_layer_threshold(kth: KthOf, inputs: Inputs) -> Callable[[], Tensor]:
    counts = counts_of(inputs)
    return lambda: torch.stack(
        [kth(s.view(-1), k) for s, k in zip(tensor_scores(inputs), counts, strict=True)]
    )


def expected_layer_threshold(inputs: Inputs) -> list[tuple[float, int, int]]:
    pairs = zip(tensor_scores(inputs), counts_of(inputs), strict=True)
    return [expected_of(scores.view(-1), k) for scores, k in pairs]


def check_threshold(expected: list[tuple[float, int, int]], answer: Selection | Tensor) -> None:
    """All three numbers of our selection; of a rival, which has no rule for ties, the threshold."""
    fields = answer[:3] if isinstance(answer, Selection) else [answer]
    columns = list(zip(*expected, strict=True))[: len(fields)]
    for name, field, right in zip(Selection._fields[: len(fields)], fields, columns, strict=True):
        for i, (a, b) in enumerate(zip(field.reshape(-1).tolist(), right, strict=True)):
            if a != b:
                raise WrongAnswerError(f"{name}[{i}] is {a!r}, expected {b!r}")


# Masks


# A rival keeps all ties at the threshold and may add a block's scores in another order.
RIVAL_MISMATCH = 1e-4


class RivalMasks(list[Tensor]):
    """Masks of a rival, which may differ from ours in a few elements."""


def our_masks(inputs: Inputs) -> Callable[[], list[Tensor]]:
    return lambda: fp.global_topk_masks(inputs.weights, inputs.num_kept, **inputs.options)


def rival_masks(kth: KthOf, inputs: Inputs) -> Callable[[], RivalMasks]:
    (k,) = counts_of(inputs)

    def run() -> RivalMasks:
        scores = tensor_scores(inputs)
        threshold = kth(torch.cat([s.view(-1) for s in scores]), k)
        return RivalMasks(s >= threshold for s in scores)

    return run


def masks_from(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """The definition: above the threshold, or equal to it and before the tie end."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    threshold, _, tie_end = expected_of(flat, k)
    kept = flat >= threshold
    kept[tie_end:] &= flat[tie_end:] > threshold
    parts = kept.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def expected_masks(inputs: Inputs) -> list[Tensor]:
    return masks_from(tensor_scores(inputs), counts_of(inputs)[0])


def check_masks(expected: list[Tensor], answer: list[Tensor]) -> None:
    wrong = sum(int((a != e).sum()) for a, e in zip(answer, expected, strict=True))
    total = sum(e.numel() for e in expected)
    allowed = max(RIVAL_MISMATCH * total, 16) if isinstance(answer, RivalMasks) else 0
    if wrong > allowed:
        raise WrongAnswerError(f"{wrong} of {total} mask elements are wrong")


# Blocks


def our_block_masks(inputs: Inputs) -> Callable[[], list[Tensor]]:
    return lambda: fp.global_topk_masks(
        inputs.weights, inputs.num_kept, block=BLOCK, **inputs.options
    )


def padded_rows(scores: Tensor) -> Tensor:
    missing = -scores.shape[0] % BLOCK[0]
    padding = (0, 0) * (scores.dim() - 1) + (0, missing)
    padded = torch.nn.functional.pad(scores, padding) if missing else scores
    return padded.view(-1, BLOCK[0], *scores.shape[1:])


def rows_of(mask: Tensor, like: Tensor) -> Tensor:
    return mask.repeat_interleave(BLOCK[0], 0)[: like.shape[0]]


def rival_block_masks(kth: KthOf, inputs: Inputs) -> Callable[[], RivalMasks]:
    (k,) = counts_of(inputs)

    def run() -> RivalMasks:
        sums = [padded_rows(s).sum(1) for s in tensor_scores(inputs)]
        threshold = kth(torch.cat([s.view(-1) for s in sums]), k)
        pairs = zip(sums, inputs.weights, strict=True)
        return RivalMasks(rows_of(s >= threshold, w) for s, w in pairs)

    return run


def expected_block_masks(inputs: Inputs) -> list[Tensor]:
    kind = inputs.options["score"]
    sums = reference.block_scores(inputs.weights, inputs.gradients, kind, BLOCK)
    masks = masks_from(sums, counts_of(inputs)[0])
    return [rows_of(m, w) for m, w in zip(masks, inputs.weights, strict=True)]


# The table of cases


def _case(
    operator: str,
    label: str,
    dtype: str,
    shape_list: list[Shape],
    *,
    saliency: bool = True,
    cuda_only: bool = False,
) -> Case:
    ours, rival, expect, check, outputs = OPERATORS[operator.removesuffix(".magnitude")]
    blocked, layered = operator.endswith(".block16x1"), operator.endswith(".layers")
    chosen = [s for s in shape_list if len(s) > 1] if blocked else shape_list
    elements = shapes.count(chosen)
    counts = [max(1, int(KEPT * prod(s))) for s in chosen]
    among = shapes.count([(-(-s[0] // BLOCK[0]), *s[1:]) for s in chosen]) if blocked else elements
    counts_given = counts if layered else int(KEPT * among)
    return Case(
        name=f"{operator}/{label}/{dtype}",
        make=partial(make_inputs, chosen, DTYPES[dtype], saliency, counts_given),
        function=ours,
        rivals={name: partial(rival, kth) for name, kth in KTH.items()},
        expect=expect,
        check=check,
        reads=lambda inputs: inputs.tensors,
        bytes_moved=elements * (DTYPES[dtype].itemsize * (1 + saliency) + outputs),
        flops=elements * saliency,  # one product; comparisons are not counted
        devices=("cuda",) if cuda_only else ("cpu", "cuda"),
        rivals_on={
            "cpu": {} if layered or blocked else {n: partial(rival, k) for n, k in CPU_KTH.items()},
            "cuda": {
                **{name: partial(rival, kth) for name, kth in CUDA_KTH.items()},
                **({"Triton twin": triton_threshold} if check is check_threshold else {}),
            },
        },
    )


# function, rival, expected answer, its check, bytes written per element
OPERATORS: dict[str, tuple[Any, Any, Any, Any, int]] = {
    "select_threshold": (our_threshold, rival_threshold, expected_threshold, check_threshold, 0),
    "select_threshold.layers": (
        our_layer_threshold,
        rival_layer_threshold,
        expected_layer_threshold,
        check_threshold,
        0,
    ),
    "select_masks": (our_masks, rival_masks, expected_masks, check_masks, 1),
    "select_masks.block16x1": (
        our_block_masks,
        rival_block_masks,
        expected_block_masks,
        check_masks,
        1,
    ),
}


def definitions() -> Iterator[Case]:
    for label, shape_list in (("resnet50", shapes.resnet50()), ("tiny", shapes.TINY)):
        yield _case("select_threshold", label, "fp32", shape_list)
        yield _case("select_threshold.magnitude", label, "fp32", shape_list, saliency=False)
        yield _case("select_threshold", label, "bf16", shape_list)
        yield _case("select_masks", label, "fp32", shape_list)
        yield _case("select_threshold.layers", label, "fp32", shape_list)
        yield _case("select_masks.block16x1", label, "fp32", shape_list)
    for dtype in ("fp32", "bf16"):
        large = shapes.elements350m()
        yield _case("select_threshold", "elements350M", dtype, large, cuda_only=True)
