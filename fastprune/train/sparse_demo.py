"""The part of the demonstration that makes single zeros pay: sparse inference on the CPU."""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..deploy import sparsify
from ..deploy.sparse_model import EAGER
from .console import print_table
from .data import Digits
from .measures import milliseconds

BATCHES = (1, 16)
REPEATS = 100


@dataclass(frozen=True)
class SparseRow:
    """Medians of turns, in milliseconds a batch."""

    images: int
    dense: float
    now: float
    returned: str


def speed_up(network: nn.Module, digits: Digits) -> list[SparseRow]:
    """The pruned network in PyTorch's faster layout, and without its zeros."""
    dense = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return [_row(dense, digits.test_images[:batch]) for batch in BATCHES]


def _row(dense: nn.Module, images: Tensor) -> SparseRow:
    with warnings.catch_warnings():  # the table says what was returned
        warnings.simplefilter("ignore")
        fast = sparsify(dense, images, rivals=(EAGER,))  # compiling takes a while
    before, now = milliseconds(dense, fast, images, REPEATS)
    return SparseRow(len(images), before, now, fast.report().returned)


def print_sparse(rows: list[SparseRow], sparsity: float) -> None:
    print_table(
        f"The network that ASWL left, {sparsity:.0%} zeros, by fp.sparsify: milliseconds",
        ["images", "dense", "now", "times faster", "returned"],
        [
            [f"{r.images}", f"{r.dense:.3f}", f"{r.now:.3f}", f"{r.dense / r.now:.1f}", r.returned]
            for r in rows
        ],
    )
