"""The specification itself, against numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from fastprune.ops.reference import block_scores, select_masks, select_threshold
from fastprune.ops.reference.select import element_scores, order_keys

# The worked example of GSM: |w * g| is .2, .2, .3, 0 | .15, .1 and Q = 3.
WEIGHTS = [torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[3.0, -0.1]])]
GRADIENTS = [torch.tensor([[0.2, 0.1], [-0.6, 5.0]]), torch.tensor([[-0.05, 1.0]])]


def select(
    values: list[Tensor], num_kept: int | list[int], score: str = "value"
) -> tuple[list[float], list[int], list[int], int]:
    found = select_threshold(values, [], torch.tensor(num_kept), score)
    threshold, ties, end = (t.reshape(-1).tolist() for t in found[:3])
    return threshold, ties, end, int(found[3])


def test_the_worked_example_keeps_the_first_three_weights() -> None:
    found = select_threshold(WEIGHTS, GRADIENTS, torch.tensor(3), "saliency")
    threshold, num_ties, tie_end, non_finite = found
    assert float(threshold) == torch.tensor(0.2).item()
    # Both .2 belong to the three; the next .2 would be beyond the end.
    assert (int(num_ties), int(tie_end), int(non_finite)) == (2, 6, 0)
    masks = select_masks(WEIGHTS, GRADIENTS, threshold, tie_end, "saliency")
    assert [m.tolist() for m in masks] == [[[True, True], [True, False]], [[False, False]]]


def test_two_of_the_worked_example_leave_out_the_second_tie() -> None:
    found = select_threshold(WEIGHTS, GRADIENTS, torch.tensor(2), "saliency")
    assert (int(found[1]), int(found[2])) == (1, 1)
    masks = select_masks(WEIGHTS, GRADIENTS, found[0], found[2], "saliency")
    assert [m.tolist() for m in masks] == [[[True, False], [True, False]], [[False, False]]]


def test_the_threshold_is_the_kth_largest_and_ties_are_counted() -> None:
    values = [torch.tensor([5.0, 1.0, 3.0]), torch.tensor([3.0, 3.0, -7.0])]
    assert select(values, 1) == ([5.0], [1], [6], 0)
    assert select(values, 2) == ([3.0], [1], [3], 0)  # the first 3 is at 2, the dropped one at 3
    assert select(values, 3) == ([3.0], [2], [4], 0)
    assert select(values, 4) == ([3.0], [3], [6], 0)
    assert select(values, 6) == ([-7.0], [1], [6], 0)


def test_keeping_nothing_is_a_threshold_of_nan() -> None:
    (threshold,), ties, _, _ = select([torch.tensor([1.0, 2.0])], 0)
    assert threshold != threshold and ties == [0]


def test_a_count_on_the_device_is_clamped() -> None:
    assert select([torch.tensor([4.0, 2.0])], 9)[0] == [2.0]
    (threshold,), ties, _, _ = select([torch.tensor([4.0, 2.0])], -3)
    assert threshold != threshold and ties == [0]


def test_each_segment_has_its_own_threshold() -> None:
    values = [torch.tensor([1.0, 9.0]), torch.tensor([4.0, 4.0, 4.0])]
    threshold, ties, end, _ = select(values, [1, 2])
    assert (threshold, ties, end) == ([9.0, 4.0], [1, 2], [2, 2])
    masks = select_masks(values, [], torch.tensor(threshold), torch.tensor(end), "value")
    assert [m.tolist() for m in masks] == [[False, True], [True, True, False]]


def test_minus_zero_ties_with_zero() -> None:
    values = [torch.tensor([-0.0, 0.0, -0.0])]
    assert select(values, 2) == ([0.0], [2], [2], 0)


@pytest.mark.parametrize(
    ("score", "expected"), [("value", [2.0, -3.0, 0.0]), ("magnitude", [2.0, 3.0, 0.0])]
)
def test_scores_of_elements(score: str, expected: list[float]) -> None:
    scores = element_scores(torch.tensor([2.0, -3.0, -0.0]), None, score)
    assert scores.tolist() == expected
    assert not scores[2].signbit()


def test_a_16_bit_product_is_formed_in_float32() -> None:
    weight = torch.tensor([2.0**-14], dtype=torch.float16)
    gradient = torch.tensor([-(2.0**-14)], dtype=torch.float16)
    assert element_scores(weight, gradient, "saliency").tolist() == [2.0**-28]  # 0 in float16


def test_keys_are_in_the_order_of_the_scores() -> None:
    ordered = torch.tensor([-torch.inf, -2.0, -1e-45, 0.0, 1e-45, 2.0, torch.inf, torch.nan])
    for scores in (ordered, ordered.double()):
        assert (order_keys(scores).diff() > 0).all()


def test_infinity_and_nan_are_reported() -> None:
    assert select([torch.tensor([1.0, -torch.inf])], 1)[3] == 1
    assert select([torch.tensor([1.0, torch.nan])], 1)[3] == 2
    assert select([torch.tensor([torch.inf, torch.nan])], 1)[3] == 3


def test_block_sums_with_ragged_edges() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0], [7.0, 8.0, 9.0]])
    (sums,) = block_scores([weight], [], "magnitude", [2, 2])
    assert sums.tolist() == [[12.0, 9.0], [15.0, 9.0]]
    (sums,) = block_scores([weight], [], "value", [2, 2])
    assert sums.tolist() == [[8.0, -3.0], [15.0, 9.0]]


def test_block_sums_keep_kernel_positions_apart() -> None:
    weight = torch.arange(8.0).view(2, 2, 2)  # [outputs, inputs, positions]
    (sums,) = block_scores([weight], [weight], "saliency", [2, 1])
    assert sums.tolist() == [[[16.0, 26.0], [40.0, 58.0]]]


def test_the_order_of_a_block_sum_is_down_the_outputs_first() -> None:
    huge = 2.0**24
    weight = torch.tensor([[huge, 1.0], [1.0, 1.0]])
    # Down: 2^24 + 1 rounds to 2^24, and 1 + 1 = 2 is then large enough to count.
    (sums,) = block_scores([weight], [], "value", [2, 2])
    assert sums.item() == huge + 2
    (sums,) = block_scores([weight.T.contiguous().flip(0)], [], "value", [2, 2])
    assert sums.item() == huge + 2


def test_empty_lists_and_tensors() -> None:
    assert select([torch.empty(0)], 0)[1:] == ([0], [0], 0)
    assert select([], 0)[1:] == ([0], [0], 0)
    assert select_masks([], [], torch.tensor(0.0), torch.tensor(0), "value") == []
